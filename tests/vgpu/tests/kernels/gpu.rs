//! CUDA C kernels for the tests: compiled by nvcc, run on the test bench.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Mutex;

use vgpu::finding::{Fault, Finding};
use vgpu::loader::Loaded;
use vgpu::machine::Config;
use vgpu::ptx::ast::Module;
use vgpu::rig::Rig;

/// nvcc: what `NVCC` names, what `tests/setup-cuda` made, or what is installed.
fn nvcc() -> PathBuf {
    if let Some(path) = std::env::var_os("NVCC") {
        return path.into();
    }
    let made = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/cuda/bin/nvcc");
    if made.is_file() { made } else { "nvcc".into() }
}

/// The PTX of one of the files in `tests/kernels`.
pub(crate) fn compile(file: &str) -> Module {
    static ONE_AT_A_TIME: Mutex<()> = Mutex::new(());
    let _guard = ONE_AT_A_TIME.lock();
    let source = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/kernels")
        .join(file);
    let output = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{file}.ptx"));
    let newer = |a: &Path, b: &Path| {
        let time = |p: &Path| p.metadata().and_then(|m| m.modified()).ok();
        time(a) > time(b)
    };
    if !newer(&output, &source) {
        let partial = output.with_extension(format!("{}", std::process::id()));
        let nvcc = nvcc();
        let run = Command::new(&nvcc)
            .args(["-arch=sm_90", "-ptx", "-lineinfo", "-fmad=false", "-o"])
            .args([&partial, &source])
            .output()
            .unwrap_or_else(|e| panic!("{}: {e}; tests/setup-cuda makes one", nvcc.display()));
        let words = String::from_utf8_lossy(&run.stderr);
        assert!(run.status.success(), "nvcc {file}: {words}");
        std::fs::rename(&partial, &output).expect("the PTX is moved into place");
    }
    let text = std::fs::read_to_string(&output).expect("nvcc wrote the PTX");
    vgpu::ptx::parse(&text).expect("the PTX of nvcc is understood")
}

/// An argument of a kernel.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Arg {
    Pointer(u64),
    Int(i32),
}

/// A device with the kernels of a module.
pub(crate) struct Gpu {
    pub(crate) rig: Rig,
    pub(crate) loaded: Loaded,
}

impl Gpu {
    pub(crate) fn new(module: &Module, seed: u64) -> Self {
        let config = Config {
            seed,
            ..Config::default()
        };
        Self::with(module, config)
    }

    pub(crate) fn with(module: &Module, config: Config) -> Self {
        let mut rig = Rig::new(config);
        let loaded = rig.load(module).expect("the module loads");
        Self { rig, loaded }
    }

    /// Puts values into device memory.
    pub(crate) fn put<T: bytemuck::Pod>(&mut self, values: &[T]) -> Arg {
        Arg::Pointer(self.rig.upload(bytemuck::cast_slice(values)))
    }

    /// Device memory that nobody wrote.
    pub(crate) fn room(&mut self, bytes: u64) -> Arg {
        Arg::Pointer(self.rig.allocate(bytes))
    }

    /// Takes values from device memory.
    pub(crate) fn get<T: bytemuck::Pod>(&mut self, at: Arg, n: usize) -> Vec<T> {
        let Arg::Pointer(at) = at else {
            panic!("no pointer");
        };
        let bytes = self.rig.download(at, n * size_of::<T>());
        bytemuck::pod_collect_to_vec(&bytes)
    }

    /// Starts a kernel.
    pub(crate) fn start(
        &mut self,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        args: &[Arg],
    ) {
        let mut params = Vec::new();
        for arg in args {
            match arg {
                Arg::Pointer(at) => {
                    params.resize(params.len().next_multiple_of(8), 0);
                    params.extend(at.to_le_bytes());
                }
                Arg::Int(value) => params.extend(value.to_le_bytes()),
            }
        }
        let kernel = &self.loaded.kernels[kernel];
        self.rig.launch(kernel, grid, block, shared, &params);
    }

    /// Runs a kernel to its end.
    pub(crate) fn run(
        &mut self,
        kernel: &str,
        grid: [u32; 3],
        block: [u32; 3],
        shared: u32,
        args: &[Arg],
    ) -> (Result<(), Fault>, Vec<Finding>) {
        self.start(kernel, grid, block, shared, args);
        let result = self.rig.synchronise();
        (result, self.rig.findings())
    }
}
