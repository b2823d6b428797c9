//! Addresses: the host faults where it follows a pointer to a device's memory, and is told; what
//! kernels see of addresses is the same in every process.

use crate::cuda::{Child, Cuda, KERNELS, child};
use crate::{cu, here};

/// Runs a body that follows a pointer, and must die of it; what it was told.
fn dies(test: &str, body: fn(&Cuda)) -> Option<String> {
    let Child {
        code,
        output,
        errors,
    } = child(test, &[("VGPU_DEVICES", "2")], body)?;
    assert_eq!(code, None, "ended by a signal: {output}\n{errors}");
    assert!(!output.contains("still here"), "{output}");
    Some(errors)
}

fn follow(at: u64) {
    // SAFETY: none: this is what must not be done, and what faults.
    let value = unsafe { (at as *const u32).read_volatile() };
    println!("still here: {value}");
}

#[test]
fn the_host_faults_on_a_pointer_to_a_device() {
    let errors = dies(here!(), |cuda| {
        cuda.start();
        cuda.context(1);
        let at = cuda.put(&[1]);
        eprintln!("at {at:#x}");
        follow(at);
    });
    if let Some(errors) = errors {
        let at = errors.lines().find_map(|l| l.strip_prefix("at "));
        let at = at.expect("the address");
        let words = format!(
            "vgpu: the host follows the pointer {at}, which is to memory of device 1: only kernels \
             and copies reach it"
        );
        assert!(errors.contains(&words), "{errors}");
    }
}

#[test]
fn the_host_faults_on_freed_pinned_memory() {
    let errors = dies(here!(), |cuda| {
        cuda.start();
        let mut at = 0u64;
        cu!(cuda, cuMemHostAlloc(&mut at, 64u64, 3u32));
        cu!(cuda, cuMemFreeHost(at));
        follow(at);
    });
    if let Some(errors) = errors {
        assert!(!errors.contains("of device"), "{errors}");
    }
}

#[test]
fn a_fault_of_another_kind_is_left_to_the_program() {
    let errors = dies(here!(), |cuda| {
        cuda.start();
        follow(8);
    });
    if let Some(errors) = errors {
        assert!(!errors.contains("of device"), "{errors}");
    }
}

/// Prints every address that a program gets.
fn addresses(cuda: &Cuda) {
    for device in [0, 1] {
        cu!(cuda, cuInit(0u32));
        cuda.context(device);
        let module = cuda.module(KERNELS);
        let (mut counter, mut bytes) = (0u64, 0u64);
        cu!(
            cuda,
            cuModuleGetGlobal_v2(&mut counter, &mut bytes, module, c"counter".as_ptr())
        );
        let (mut pinned, mut mapped, mut managed, mut pool) = (0u64, 0u64, 0u64, 0u64);
        cu!(cuda, cuMemAllocHost_v2(&mut pinned, 5000u64));
        cu!(cuda, cuMemHostAlloc(&mut mapped, 10u64, 3u32));
        cu!(cuda, cuMemAllocManaged(&mut managed, 10u64, 1u32));
        cu!(cuda, cuMemAllocAsync(&mut pool, 10u64, 0u64));
        let own = cuda.put(&[1]);
        println!("\nout {counter:#x} {pinned:#x} {mapped:#x} {managed:#x} {pool:#x} {own:#x}");
        // SAFETY: memory of the host, with as many bytes.
        unsafe { (pinned as *mut u8).add(4999).write(1) };
    }
}

#[test]
fn memory_lies_where_it_lies_in_every_process() {
    let name = here!();
    let run = || child(name, &[("VGPU_DEVICES", "2")], addresses);
    let Some(first) = run() else { return };
    let lines = |child: &Child| -> Vec<String> {
        assert_eq!(child.code, Some(0), "{}", child.errors);
        let lines = child.output.lines().filter(|l| l.starts_with("out "));
        lines.map(str::to_owned).collect()
    };
    assert_eq!(lines(&first).len(), 2, "{}", first.output);
    for _ in 0..3 {
        let again = run().expect("the parent");
        assert_eq!(lines(&first), lines(&again));
    }
}
