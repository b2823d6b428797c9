//! Puts a CUDA driver under the tests of the feature `cuda`.
//!
//! **The virtual GPU, always.** Depending on this crate makes cargo build `tests/vgpu` and start
//! tests with it as their `libcuda.so.1` (`build.rs` says how); `.cargo/config.toml` gives it eight
//! devices. A test takes the driver with `take`, which checks when it is dropped that no
//! finding is left; one that provokes findings takes them with `Taken::findings`.
//!
//! **A real driver as well, where there is one.** Every test file has
//! `test_driver::also_on_a_real_driver!()`: a test that starts the file's other tests again
//! without the virtual GPU on their library path, and says SKIPPED and why where no driver is
//! installed. `RINGTP_DRIVER` chooses: `vgpu`, `real`, or `both`, which makes a missing driver an
//! error; unset is `vgpu`, plus `real` where present.
//!
//! **Counts.** `Taken::count` begins to count what kernels and copies do, `Taken::report` gives the
//! counts: instructions, bytes, sectors, bank conflicts, synchronisation, traffic over links.
//!
//! What a machine lacks is never left out in silence: `Taken::has_devices` prints SKIPPED.

#![cfg(all(feature = "vgpu", target_os = "linux"))]

// The same lines as in the virtual GPU, which writes what is read here.
#[path = "../../vgpu/src/report/shape.rs"]
pub mod report;

use std::ffi::{CStr, c_char, c_void};
use std::io::Write;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Set for the tests that run on the real driver.
const REAL: &str = "RINGTP_TEST_ON_REAL_DRIVER";

/// Set for the tests that run once more on the virtual one.
const AGAIN: &str = "RINGTP_TEST_AGAIN";
/// Set for the process of [`in_a_child`].
const CHILD: &str = "RINGTP_TEST_IN_A_CHILD";

/// What a child prints when its body has come to its end.
const BODY_DONE: &str = "the body of the test has run in its child";

type TakeText = unsafe extern "C" fn(*mut c_char, usize, *mut usize) -> u32;

/// Says that something was left out and why, also where the test harness keeps what tests print to
/// itself.
pub fn skipped(why: impl std::fmt::Display) {
    // If standard error is closed, there is nobody to tell.
    let _ = writeln!(std::io::stderr(), "SKIPPED: {why}");
}

/// The address of a function that the driver has only if it is the virtual one. The crate loads
/// its driver by this name too, when it first needs it.
fn extra(name: &CStr) -> Option<*mut c_void> {
    // SAFETY: both names end in zero; loading a driver is what these tests are for. It stays.
    let address = unsafe {
        let driver = libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW);
        if driver.is_null() {
            return None;
        }
        libc::dlsym(driver, name.as_ptr())
    };
    (!address.is_null()).then_some(address)
}

fn take_findings() -> Option<TakeText> {
    // SAFETY: the virtual GPU exports this name with this type.
    extra(c"vgpuTakeFindings").map(|f| unsafe { std::mem::transmute::<*mut c_void, TakeText>(f) })
}

/// Whether the driver of this process is the virtual one.
pub fn is_virtual() -> bool {
    take_findings().is_some()
}

/// What the virtual GPU found since the last time, one a line; nothing on a real driver.
fn findings() -> Vec<String> {
    let Some(take) = take_findings() else {
        return Vec::new();
    };
    let mut text: Vec<u8> = vec![0; 1 << 20];
    let mut length = 0;
    // SAFETY: writes at most that many bytes, and one number.
    let code = unsafe { take(text.as_mut_ptr().cast(), text.len(), &mut length) };
    assert_eq!(code, 0, "vgpuTakeFindings");
    let text = CStr::from_bytes_until_nul(&text).map_or_else(
        |_| String::from_utf8_lossy(&text).into_owned(),
        |text| text.to_string_lossy().into_owned(),
    );
    text.lines().map(String::from).collect()
}

static DRIVER: Mutex<()> = Mutex::new(());

/// The driver, for one test at a time: findings belong to the process.
#[derive(Debug)]
pub struct Taken {
    _guard: MutexGuard<'static, ()>,
}

/// Takes the driver, or `None` (SKIPPED is printed) where `RINGTP_DRIVER=real` leaves the virtual
/// one out.
pub fn take() -> Option<Taken> {
    if is_virtual() && choice() == Choice::Real {
        skipped("on the virtual GPU, since RINGTP_DRIVER=real");
        return None;
    }
    let guard = DRIVER.lock().unwrap_or_else(PoisonError::into_inner);
    // What a test that failed has left is not this one's.
    let _ = findings();
    Some(Taken { _guard: guard })
}

impl Taken {
    /// What the virtual GPU found since the last time; nothing on a real driver.
    pub fn findings(&self) -> Vec<String> {
        findings()
    }

    /// Begins to count what kernels and copies do, from nothing. False on a real driver, which
    /// does not count.
    pub fn count(&self) -> bool {
        let Some(set) = extra(c"vgpuSetReport") else {
            return false;
        };
        // SAFETY: the virtual GPU exports this name with this type.
        let set = unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(u32) -> u32>(set) };
        assert_eq!(set(1), 0, "vgpuSetReport");
        true
    }

    /// What was counted since [`count`](Self::count), or since the last report. Panics if counting
    /// was not begun.
    pub fn report(&self) -> report::Report {
        let take = extra(c"vgpuTakeReport").expect("count() gave true");
        // SAFETY: the virtual GPU exports this name with this type.
        let take = unsafe { std::mem::transmute::<*mut c_void, TakeText>(take) };
        let (mut text, mut length) = (Vec::<u8>::new(), 1 << 16);
        // With too little room nothing is taken.
        while text.len() < length {
            text.resize(length, 0);
            // SAFETY: writes at most that many bytes, and one number.
            let code = unsafe { take(text.as_mut_ptr().cast(), text.len(), &mut length) };
            assert_eq!(code, 0, "vgpuTakeReport");
        }
        serde_json::from_slice(&text[..length - 1]).expect("a report")
    }

    /// What kernels have done to a part of an allocation since counting began: for one that holds
    /// several tensors. It begins and ends at multiples of 4. Takes nothing.
    pub fn touched(&self, address: u64, bytes: u64) -> report::Touched {
        type Count = unsafe extern "C" fn(u64, u64, *mut [u64; 4]) -> u32;
        let count = extra(c"vgpuCountBytes").expect("count() gave true");
        // SAFETY: the virtual GPU exports this name with this type.
        let count = unsafe { std::mem::transmute::<*mut c_void, Count>(count) };
        let mut counts = [0; 4];
        // SAFETY: writes four numbers.
        let code = unsafe { count(address, bytes, &mut counts) };
        assert_eq!(code, 0, "vgpuCountBytes({address:#x}, {bytes})");
        let [read, read_distinct, written, written_distinct] = counts;
        report::Touched {
            address,
            bytes,
            device: None,
            read,
            read_distinct,
            written,
            written_distinct,
        }
    }

    /// Starts the virtual GPU's choices anew from a seed, while nothing is in progress; a real
    /// driver makes its own.
    pub fn set_seed(&self, seed: u64) {
        if let Some(address) = extra(c"vgpuSetSeed") {
            // SAFETY: the virtual GPU exports this name with this type.
            let set =
                unsafe { std::mem::transmute::<*mut c_void, extern "C" fn(u64) -> u32>(address) };
            assert_eq!(set(seed), 0, "vgpuSetSeed");
        }
    }

    /// Starts the virtual GPU's choices anew: the order of turns, the kind of schedule, a slow
    /// device or link among the first `devices`, and which old values are read. Nothing may be in
    /// progress. Does nothing on a real driver.
    pub fn explore(&self, seed: u64, devices: u32) {
        let Some(explore) = extra(c"vgpuExplore") else {
            return;
        };
        type Explore = unsafe extern "C" fn(u64, u32) -> u32;
        // SAFETY: the virtual GPU exports this name with this type.
        let explore = unsafe { std::mem::transmute::<*mut c_void, Explore>(explore) };
        // SAFETY: takes two numbers.
        let code = unsafe { explore(seed, devices) };
        assert_eq!(code, 0, "vgpuExplore, with seed {seed}");
    }

    /// Whether the driver has `wanted` devices, given how many there are; prints SKIPPED if not.
    pub fn has_devices(&self, wanted: usize, there: usize) -> bool {
        if there < wanted {
            assert!(
                !is_virtual(),
                "VGPU_DEVICES: this test needs {wanted} devices, found {there}; unset it"
            );
            skipped(format_args!(
                "needs {wanted} devices, this driver has {there}"
            ));
        }
        there >= wanted
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let left = findings();
        if !left.is_empty() && !std::thread::panicking() {
            panic!("the virtual GPU found:\n{}", left.join("\n"));
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Choice {
    /// The virtual one, and a real one where present.
    Default,
    Vgpu,
    Real,
    Both,
}

fn choice() -> Choice {
    match std::env::var("RINGTP_DRIVER").as_deref() {
        Err(_) | Ok("") => Choice::Default,
        Ok("vgpu") => Choice::Vgpu,
        Ok("real") => Choice::Real,
        Ok("both") => Choice::Both,
        Ok(other) => panic!("RINGTP_DRIVER: expected vgpu, real or both, found {other}"),
    }
}

/// Where this machine's own driver is.
fn real_driver() -> Option<PathBuf> {
    let own = PathBuf::from(env!("TEST_DRIVER_DIR"));
    let listed = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let usual = [
        "/usr/lib/x86_64-linux-gnu",
        "/usr/lib/aarch64-linux-gnu",
        "/usr/lib64",
        "/usr/lib",
        "/usr/local/cuda/compat",
        "/usr/lib/wsl/lib",
        "/run/opengl-driver/lib",
    ];
    std::env::split_paths(&listed)
        .filter(|directory| *directory != own)
        .chain(usual.map(PathBuf::from))
        .map(|directory| directory.join("libcuda.so.1"))
        .find(|file| file.exists())
}

fn program() -> PathBuf {
    std::env::current_exe().expect("a running program has a path")
}

/// Runs the other tests of this file on the real driver; the body of
/// [`also_on_a_real_driver!`].
pub fn run_again_on_a_real_driver(this: &str) {
    if std::env::var_os(REAL).is_some() || std::env::var_os(AGAIN).is_some() {
        return;
    }
    let driver = match (choice(), real_driver()) {
        (Choice::Vgpu, _) => {
            skipped("on a real driver, since RINGTP_DRIVER=vgpu");
            return;
        }
        (Choice::Default, None) => {
            skipped("on a real driver: no libcuda.so.1 is installed");
            return;
        }
        (Choice::Real | Choice::Both, None) => {
            panic!("RINGTP_DRIVER asks for a real driver and no libcuda.so.1 is installed")
        }
        (_, Some(driver)) => driver,
    };
    let own = PathBuf::from(env!("TEST_DRIVER_DIR"));
    let listed = std::env::var_os("LD_LIBRARY_PATH").unwrap_or_default();
    let mut paths: Vec<PathBuf> = std::env::split_paths(&listed).collect();
    paths.retain(|directory| *directory != own);
    paths.extend(driver.parent().map(PathBuf::from));
    let paths = std::env::join_paths(paths).expect("paths without colons");
    println!("again on {}", driver.display());
    let status = Command::new(program())
        .args(["--skip", this, "--test-threads=1", "--nocapture"])
        .env("LD_LIBRARY_PATH", paths)
        .env(REAL, "1")
        .status()
        .expect("the tests start again");
    assert!(status.success(), "on the real driver: {status}");
}

/// Runs the other tests of this file again on virtual GPUs of every other architecture, each with
/// a scheduler's seed of its own; the body of [`also_on_every_architecture!`].
pub fn run_again_on_every_architecture(this: &str) {
    if std::env::var_os(REAL).is_some() || std::env::var_os(AGAIN).is_some() {
        return;
    }
    if choice() == Choice::Real {
        skipped("on virtual GPUs, since RINGTP_DRIVER=real");
        return;
    }
    for arch in ["80", "100", "120"] {
        let status = Command::new(program())
            .args(["--skip", this, "--test-threads=1"])
            .env("VGPU_ARCH", arch)
            .env("VGPU_SEED", arch)
            .env(AGAIN, "1")
            .status()
            .expect("the tests start again");
        assert!(
            status.success(),
            "on a virtual GPU of architecture {arch}: {status}"
        );
    }
}

/// Of so many random cases, how many to run here: all on the first driver, a few on the virtual
/// GPUs of other architectures.
pub fn cases_here(all: u64) -> u64 {
    match std::env::var_os(AGAIN) {
        None => all,
        Some(_) => all.div_ceil(12),
    }
}

/// Runs `body` in a process of its own, for a test that loses the context: this process starts
/// test `this` again, where `body` runs, and gets what it printed.
pub fn in_a_child(this: &str, body: impl FnOnce()) -> Option<String> {
    in_a_child_with(this, &[], body)
}

/// The same with these variables set there: another `VGPU_TOPOLOGY`, say. A test may do so several
/// times, with different ones: each child runs the body that it was started for.
pub fn in_a_child_with(
    this: &str,
    variables: &[(&str, &str)],
    body: impl FnOnce(),
) -> Option<String> {
    // What tells the child from those for other variables.
    let role = format!("{variables:?}");
    if let Some(child) = std::env::var_os(CHILD) {
        if child.to_str() == Some(role.as_str()) {
            body();
            println!("{BODY_DONE}");
        }
        return None;
    }
    let output = Command::new(program())
        .args([this, "--exact", "--nocapture", "--test-threads=1"])
        .envs(variables.iter().copied())
        .env(CHILD, role)
        .output()
        .expect("the test starts again");
    let words = String::from_utf8_lossy(&output.stdout).into_owned();
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        output.status.success(),
        "{}\n{words}\n{errors}",
        output.status
    );
    assert!(words.contains(BODY_DONE), "{this} did not run in its child");
    Some(words)
}

/// A test that runs the file's other tests on virtual GPUs of every architecture.
#[macro_export]
macro_rules! also_on_every_architecture {
    () => {
        #[test]
        fn also_on_every_architecture() {
            ::test_driver::run_again_on_every_architecture("also_on_");
        }
    };
}

/// A test that runs the file's other tests on this machine's own driver, where there is one.
#[macro_export]
macro_rules! also_on_a_real_driver {
    () => {
        #[test]
        fn also_on_a_real_driver() {
            ::test_driver::run_again_on_a_real_driver("also_on_");
        }
    };
}
