//! Kernels with one fault each: the check meant for it finds it, once, and says where.

use crate::gpu::{Arg, Gpu, compile};
use vgpu::finding::{Kind, Place};

/// A mutant: how it is launched, and the kind of its fault.
struct Mutant {
    kernel: &'static str,
    kind: Kind,
    grid: u32,
    block: u32,
    shared: u32,
    args: fn(&mut Gpu) -> Vec<Arg>,
}

fn mutants() -> Vec<Mutant> {
    use Kind::*;
    let mutant = |kernel, kind, grid, block, args| Mutant {
        kernel,
        kind,
        grid,
        block,
        shared: 0,
        args,
    };
    fn zeros(gpu: &mut Gpu, n: usize) -> Arg {
        gpu.put(&vec![0i32; n])
    }
    let mut list = vec![
        mutant("read_beyond", OutOfBounds, 1, 32, |g| {
            vec![zeros(g, 32), zeros(g, 32), Arg::Int(32)]
        }),
        // 33 bytes: the word is there, the byte is not.
        mutant("write_beyond", OutOfBounds, 1, 64, |g| {
            vec![g.room(33), Arg::Int(33)]
        }),
        mutant("shared_beyond", OutOfBounds, 1, 32, |g| vec![zeros(g, 32)]),
        mutant("local_beyond", OutOfBounds, 1, 1, |g| {
            vec![zeros(g, 1), Arg::Int(1)]
        }),
        mutant("null_pointer", OutOfBounds, 1, 32, |g| {
            vec![zeros(g, 32), Arg::Pointer(0)]
        }),
        mutant("misaligned", Misaligned, 1, 1, |g| {
            vec![zeros(g, 4), zeros(g, 8)]
        }),
        mutant("after_free", UseAfterFree, 1, 32, |g| {
            let freed = zeros(g, 32);
            let Arg::Pointer(at) = freed else {
                panic!("no pointer");
            };
            g.rig.machine.world.memory.free(at).expect("it is there");
            vec![zeros(g, 32), freed]
        }),
        mutant("unwritten_branch", Uninitialised, 1, 32, |g| {
            vec![zeros(g, 32), g.room(128)]
        }),
        mutant("unwritten_result", Uninitialised, 1, 32, |g| {
            vec![g.room(128), g.room(128)]
        }),
        mutant("unwritten_shared", Uninitialised, 1, 64, |g| {
            vec![g.room(256)]
        }),
        mutant("unwritten_index", Uninitialised, 1, 32, |g| {
            vec![g.room(128), g.room(128), zeros(g, 4)]
        }),
        mutant("unwritten_counter", Uninitialised, 1, 32, |g| {
            vec![g.room(4)]
        }),
        mutant("unwritten_local", Uninitialised, 1, 32, |g| {
            vec![g.room(128), Arg::Int(3)]
        }),
        mutant("missing_barrier", Race, 1, 64, |g| vec![g.room(256)]),
        mutant("missing_second_barrier", Race, 1, 64, |g| vec![g.room(256)]),
        mutant("missing_syncwarp", Race, 1, 32, |g| vec![g.room(128)]),
        mutant("same_word", Race, 4, 32, |g| vec![zeros(g, 1)]),
        mutant("plain_histogram", Race, 1, 32, |g| {
            vec![zeros(g, 4), zeros(g, 32)]
        }),
        mutant("counter_read_plainly", Race, 1, 64, |g| {
            vec![g.room(4), zeros(g, 1)]
        }),
        mutant("counter_reset_plainly", Race, 1, 64, |g| vec![zeros(g, 1)]),
        mutant("byte_overwritten", Race, 1, 64, |g| {
            vec![g.room(64), zeros(g, 8)]
        }),
        mutant("missing_fence", Race, 2, 1, |g| {
            vec![zeros(g, 1), zeros(g, 1), g.room(4)]
        }),
        mutant("narrow_scope", Race, 2, 1, |g| {
            vec![zeros(g, 1), zeros(g, 1), g.room(4)]
        }),
        mutant("last_block_without_fence", Race, 4, 32, |g| {
            vec![g.room(4), g.room(16), zeros(g, 1)]
        }),
        mutant("non_coherent", Race, 1, 32, |g| {
            vec![g.room(128), g.room(128)]
        }),
        mutant("mask_without_self", WrongMask, 1, 32, |g| vec![g.room(128)]),
        mutant("mask_of_others", WrongMask, 1, 32, |g| vec![g.room(128)]),
        mutant("diverged_barrier", Barrier, 1, 64, |g| vec![g.room(256)]),
        mutant("barrier_of_too_many", Deadlock, 1, 32, |g| {
            vec![g.room(256)]
        }),
        mutant("barrier_that_disagrees", Barrier, 1, 64, |g| {
            vec![g.room(256)]
        }),
        mutant("waits_for_ever", Deadlock, 1, 32, |g| vec![zeros(g, 1)]),
        mutant("too_many_blocks", Deadlock, 300, 32, |g| vec![zeros(g, 1)]),
        mutant("writes_constant", ReadOnly, 1, 1, |g| vec![zeros(g, 1)]),
        mutant("failed_assertion", Trap, 1, 32, |_| vec![Arg::Int(20)]),
        mutant("trapped", Trap, 1, 32, |_| vec![Arg::Int(5)]),
    ];
    for mutant in &mut list {
        match mutant.kernel {
            "shared_beyond" => mutant.shared = 128,
            // Two blocks to a multiprocessor: 264 of the 300 fit.
            "too_many_blocks" => mutant.shared = 100 << 10,
            _ => {}
        }
    }
    list
}

/// The lines with the fault of a kernel.
fn marked(kernel: &str) -> Vec<u32> {
    let text = include_str!("mutants.cu");
    let lines = text.lines().zip(1..);
    lines
        .filter(|(line, _)| line.trim_end().ends_with(&format!("// fault: {kernel}")))
        .map(|(_, number)| number)
        .collect()
}

#[test]
fn every_mutant_is_found_by_its_check_at_its_line() {
    let module = compile("mutants.cu");
    let list = mutants();
    assert!(list.len() >= 20);
    let mut wrong = Vec::new();
    for mutant in &list {
        for seed in 0..10 {
            let mut gpu = Gpu::new(&module, seed);
            let args = (mutant.args)(&mut gpu);
            let (grid, block) = ([mutant.grid, 1, 1], [mutant.block, 1, 1]);
            let (_, findings) = gpu.run(mutant.kernel, grid, block, mutant.shared, &args);
            let lines = marked(mutant.kernel);
            assert!(!lines.is_empty(), "{} has no marked line", mutant.kernel);
            let words: Vec<String> = findings.iter().map(ToString::to_string).collect();
            // A race has two sides; either may come second.
            let at_line = |place: &Option<Place>| {
                place.as_ref().is_some_and(|place| {
                    place.kernel == mutant.kernel
                        && place.source.iter().any(|(file, line)| {
                            file.ends_with("mutants.cu") && lines.contains(line)
                        })
                })
            };
            let right = findings.len() == 1 && {
                let finding = &findings[0];
                let other = finding.other.as_ref();
                finding.kind == mutant.kind
                    && (at_line(&finding.place) || other.is_some_and(|o| at_line(&o.0)))
                    && finding.thread.is_some()
            };
            if !right {
                wrong.push(format!("{} (seed {seed}): {words:#?}", mutant.kernel));
                break;
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn the_same_seed_gives_the_same_report() {
    let module = compile("mutants.cu");
    for mutant in mutants() {
        let report = |seed| {
            let mut gpu = Gpu::new(&module, seed);
            let args = (mutant.args)(&mut gpu);
            let (grid, block) = ([mutant.grid, 1, 1], [mutant.block, 1, 1]);
            let (result, findings) = gpu.run(mutant.kernel, grid, block, mutant.shared, &args);
            (result, findings, gpu.rig.machine.world.now)
        };
        assert_eq!(report(7), report(7), "{}", mutant.kernel);
    }
}
