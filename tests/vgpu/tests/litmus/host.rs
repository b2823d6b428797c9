//! The host as an actor: it writes mapped memory without telling anybody.

use vgpu::machine::{Config, Progress};
use vgpu::race::Stale;
use vgpu::rig::Rig;

const POLL: &str = ".version 8.5\n.target sm_90\n.address_size 64\n\
    .visible .entry poll(.param .u64 flag, .param .u64 out) {\n\
    .reg .b64 %f, %o; .reg .b32 %v, %d; .reg .pred %p;\n\
    ld.param.u64 %f, [flag]; ld.param.u64 %o, [out];\n\
    again: ld.acquire.sys.global.u32 %v, [%f]; setp.ne.u32 %p, %v, 1; @%p bra again;\n\
    ld.global.u32 %d, [%f+4]; st.global.u32 [%o], %d;\n\
    st.release.sys.global.u32 [%f], 2; ret; }\n";

/// A kernel polls a flag that the host stores, reads the data beside it, and answers: no finding,
/// whatever old values it gets on the way.
#[test]
fn stores_of_the_host_release_a_spinner() {
    let module = vgpu::ptx::parse(POLL).expect("the kernel's PTX");
    for stale in [Stale::Newest, Stale::Random, Stale::Oldest] {
        for seed in 0..50 {
            let mut rig = Rig::new(Config {
                seed,
                stale,
                ..Config::default()
            });
            let kernel = rig.load(&module).expect("it loads").kernels["poll"].clone();
            let page = Box::leak(Box::new([0u32; 2])).as_mut_ptr();
            let out = rig.upload(&[0; 4]);
            // SAFETY: the page is never freed.
            unsafe { rig.machine.world.memory.map_host(page.cast(), 8, 0) };
            let params = [(page as u64).to_le_bytes(), out.to_le_bytes()].concat();
            rig.launch(&kernel, [1; 3], [1; 3], 0, &params);
            for _ in 0..20 + seed {
                // It spins until the machine sees that only the host can help.
                match rig.machine.step() {
                    Progress::Advanced | Progress::Released | Progress::TooEarly => {}
                    Progress::Stuck => break,
                    _ => panic!("seed {seed}, {stale:?}: the kernel ended before its time"),
                }
            }
            // SAFETY: nobody but this thread steps the machine, and the page is alive.
            unsafe {
                page.add(1).write_volatile(7);
                page.write_volatile(1);
            }
            assert_eq!(rig.synchronise(), Ok(()), "seed {seed}, {stale:?}");
            let findings = rig.findings();
            assert!(findings.is_empty(), "seed {seed}, {stale:?}: {findings:?}");
            assert_eq!(rig.download(out, 4), [7, 0, 0, 0], "seed {seed}, {stale:?}");
            // SAFETY: as above.
            assert_eq!(unsafe { page.read_volatile() }, 2);
        }
    }
}
