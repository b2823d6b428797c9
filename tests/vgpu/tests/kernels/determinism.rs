//! The same seed gives the same bytes and the same report, in another process too: nothing
//! depends on addresses of the host, on the order of hash tables or on time.

use std::process::Command;

use crate::gpu::{Arg, Gpu, compile};

/// Says to the child what to do: the seed.
const SEED: &str = "VGPU_TEST_SEED";

/// Runs kernels whose outcome depends on the order of everything, and tells all that came of
/// them in words: results, findings, time.
fn story(seed: u64) -> String {
    let mut story = String::new();
    let module = compile("clean.cu");
    let mut gpu = Gpu::new(&module, seed);
    let values: Vec<f32> = (0..1000).map(|i| (i * 37 % 101) as f32).collect();
    // Float atomics: the sum depends on the order of the additions.
    let (x, out) = (gpu.put(&values), gpu.put(&[0f32]));
    let thirds = gpu.put(&values.iter().map(|v| v / 3.0).collect::<Vec<f32>>());
    for at in [x, thirds] {
        let args = [out, at, Arg::Int(1000)];
        let (result, findings) = gpu.run("warp_sum", [8, 1, 1], [128, 1, 1], 0, &args);
        story += &format!("{result:?} {findings:?} {:x?}\n", gpu.get::<u32>(out, 1));
    }
    let module = compile("mutants.cu");
    let names: Vec<String> = {
        let gpu = Gpu::new(&module, seed);
        let mut names: Vec<String> = gpu.loaded.kernels.keys().cloned().collect();
        names.sort();
        names
    };
    for name in names {
        // With arguments that are enough for any of them; what it makes of them is not the point.
        let config = vgpu::machine::Config {
            seed,
            launch_budget: 200_000,
            ..Default::default()
        };
        let mut gpu = Gpu::with(&module, config);
        let (a, b) = (gpu.put(&[0i32; 256]), gpu.put(&[1i32; 256]));
        let (result, findings) = gpu.run(&name, [2, 1, 1], [64, 1, 1], 1024, &[a, b, b, b]);
        story += &format!("{name}: {result:?} after {}\n", gpu.rig.machine.world.now);
        for finding in findings {
            story += &format!("  {finding}\n");
        }
        story += &format!("  {:x?}\n", gpu.get::<u32>(a, 256));
    }
    story
}

#[test]
#[ignore = "the child of the test below"]
fn tell_the_story() {
    let seed = std::env::var(SEED).expect("the parent gives a seed");
    let path = std::env::var("VGPU_TEST_STORY").expect("the parent gives a place");
    let story = story(seed.parse().expect("a number"));
    std::fs::write(path, story).expect("the story is written");
}

#[test]
fn the_same_seed_gives_the_same_bytes_and_report_in_another_process() {
    let this = std::env::current_exe().expect("a test has a file");
    let tell = |seed: u64, copy: usize| -> String {
        let path = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"))
            .join(format!("story-{}-{seed}-{copy}", std::process::id()));
        let child = Command::new(&this)
            .args(["--exact", "determinism::tell_the_story", "--ignored"])
            .env(SEED, seed.to_string())
            .env("VGPU_TEST_STORY", &path)
            // Another environment moves the child's stack and its heap.
            .env("VGPU_TEST_PADDING", "x".repeat(1000 * copy))
            .output()
            .expect("the child starts");
        let words = String::from_utf8_lossy(&child.stdout);
        assert!(child.status.success(), "seed {seed}: {words}");
        let story = std::fs::read_to_string(&path).expect("the child told its story");
        let _ = std::fs::remove_file(&path);
        story
    };
    let mut stories: Vec<String> = Vec::new();
    for seed in 0..4 {
        let (one, other) = (tell(seed, 0), tell(seed, 7));
        for (a, b) in one.lines().zip(other.lines()) {
            assert_eq!(a, b, "seed {seed}");
        }
        assert_eq!(one, other, "seed {seed}");
        assert!(one.contains("race"), "there is something to report");
        stories.push(one);
    }
    // And the seed does decide: other seeds tell other stories.
    stories.sort();
    stories.dedup();
    assert!(stories.len() > 1, "all seeds told the same story");
}
