//! The library, loaded by its name in a process of its own, and calls to it.

use std::ffi::CString;
use std::path::PathBuf;
use std::process::Command;
use std::sync::OnceLock;

/// Set in the process that runs a test's body.
const CHILD: &str = "VGPU_TEST_CHILD";

/// The directory with this build of the library under the name that programs look for.
pub(crate) fn library_path() -> PathBuf {
    static MADE: OnceLock<PathBuf> = OnceLock::new();
    let make = || {
        let test = std::env::current_exe().expect("a test is a program");
        let library = test.with_file_name("libvgpu.so");
        assert!(library.is_file(), "{} is not built", library.display());
        let directory = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("libcuda");
        std::fs::create_dir_all(&directory).expect("a directory for the library");
        let link = directory.join("libcuda.so.1");
        if std::fs::read_link(&link).ok() != Some(library.clone()) {
            // Another test process may be doing the same.
            let fresh = directory.join(format!("link.{}", std::process::id()));
            let _ = std::fs::remove_file(&fresh);
            std::os::unix::fs::symlink(&library, &fresh).expect("a link to the library");
            std::fs::rename(&fresh, &link).expect("the link is moved into place");
        }
        directory
    };
    MADE.get_or_init(make).clone()
}

/// What a child came to.
pub(crate) struct Child {
    pub(crate) code: Option<i32>,
    pub(crate) output: String,
    pub(crate) errors: String,
}

/// Runs a program with the library under it.
pub(crate) fn run(command: &mut Command) -> Child {
    let output = command
        .env("LD_LIBRARY_PATH", library_path())
        .output()
        .unwrap_or_else(|e| panic!("{command:?}: {e}"));
    Child {
        code: output.status.code(),
        output: String::from_utf8_lossy(&output.stdout).into_owned(),
        errors: String::from_utf8_lossy(&output.stderr).into_owned(),
    }
}

/// Runs the body of a test in a process of its own, with these variables set; what it came to,
/// or nothing in that process itself.
pub(crate) fn child(
    test: &str,
    variables: &[(&str, &str)],
    body: impl FnOnce(&Cuda),
) -> Option<Child> {
    let test = test.strip_prefix("driver::").unwrap_or(test);
    if std::env::var(CHILD).is_ok_and(|name| name == test) {
        body(&Cuda::open());
        return None;
    }
    let mut command = Command::new(std::env::current_exe().expect("a test is a program"));
    command.args([test, "--exact", "--nocapture", "--test-threads=1"]);
    command.env(CHILD, test).env("RUST_BACKTRACE", "0");
    command.envs(variables.iter().copied());
    Some(run(&mut command))
}

/// As [`child`], for a body that must pass and leave no findings.
pub(crate) fn passes(test: &str, variables: &[(&str, &str)], body: fn(&Cuda)) {
    if let Some(child) = child(test, variables, body) {
        let Child {
            code,
            output,
            errors,
        } = child;
        assert_eq!(code, Some(0), "{output}\n{errors}");
        assert!(output.contains("1 passed"), "nothing ran: {output}");
        assert!(!errors.contains("please report this"), "{errors}");
    }
}

/// The name of the function this stands in.
#[macro_export]
macro_rules! here {
    () => {{
        fn here() {}
        let name = std::any::type_name_of_val(&here);
        name.strip_suffix("::here").expect("of a function")
    }};
}

/// An argument: every one of this API fits into a register.
pub(crate) trait Word {
    fn word(self) -> u64;
}

macro_rules! words {
    ($($ty:ty),*) => { $(impl Word for $ty {
        fn word(self) -> u64 { self as u64 }
    })* };
}
words!(u8, u16, u32, u64, i32, usize);

impl<T> Word for *const T {
    fn word(self) -> u64 {
        self as u64
    }
}
impl<T> Word for &mut T {
    fn word(self) -> u64 {
        std::ptr::from_mut(self) as u64
    }
}
impl<T> Word for &T {
    fn word(self) -> u64 {
        std::ptr::from_ref(self) as u64
    }
}
impl<T> Word for &mut [T] {
    fn word(self) -> u64 {
        self.as_mut_ptr() as u64
    }
}
impl<T> Word for &[T] {
    fn word(self) -> u64 {
        self.as_ptr() as u64
    }
}

/// Calls a function and gives its result.
#[macro_export]
macro_rules! result {
    ($cuda:expr, $name:ident($($arg:expr),* $(,)?)) => {
        $cuda.call(stringify!($name), &[$($crate::cuda::Word::word($arg)),*])
    };
}

/// Calls a function, which must succeed.
#[macro_export]
macro_rules! cu {
    ($cuda:expr, $name:ident($($arg:expr),* $(,)?)) => {{
        let code = $crate::result!($cuda, $name($($arg),*));
        assert_eq!(code, 0, "{}", stringify!($name));
    }};
}

/// Calls a function, which must fail with this code.
#[macro_export]
macro_rules! fails {
    ($code:expr, $cuda:expr, $name:ident($($arg:expr),* $(,)?)) => {{
        let code = $crate::result!($cuda, $name($($arg),*));
        assert_eq!(code, $code, "{}", stringify!($name));
    }};
}

/// The library.
pub(crate) struct Cuda(usize);

impl Cuda {
    pub(crate) fn open() -> Self {
        // SAFETY: the name ends in a zero.
        let handle = unsafe { libc::dlopen(c"libcuda.so.1".as_ptr(), libc::RTLD_NOW) };
        assert!(!handle.is_null(), "libcuda.so.1 is not found");
        Self(handle as usize)
    }

    pub(crate) fn address(&self, name: &str) -> Option<usize> {
        let name = CString::new(name).expect("a name");
        // SAFETY: the handle is open and the name ends in a zero.
        let at = unsafe { libc::dlsym(self.0 as *mut libc::c_void, name.as_ptr()) };
        (!at.is_null()).then_some(at as usize)
    }

    pub(crate) fn call(&self, name: &str, args: &[u64]) -> u32 {
        let at = self
            .address(name)
            .unwrap_or_else(|| panic!("{name} is missing"));
        call(at, args)
    }

    /// Initialises the driver and makes device 0's primary context current.
    pub(crate) fn start(&self) -> u64 {
        cu!(self, cuInit(0u32));
        self.context(0)
    }

    /// Makes a device's primary context current.
    pub(crate) fn context(&self, device: i32) -> u64 {
        let mut context = 0u64;
        cu!(self, cuDevicePrimaryCtxRetain(&mut context, device));
        cu!(self, cuCtxSetCurrent(context));
        context
    }

    pub(crate) fn module(&self, ptx: &str) -> u64 {
        let text = CString::new(ptx).expect("a text");
        let mut module = 0u64;
        cu!(self, cuModuleLoadData(&mut module, text.as_ptr()));
        module
    }

    pub(crate) fn function(&self, module: u64, name: &str) -> u64 {
        let name = CString::new(name).expect("a name");
        let mut function = 0u64;
        cu!(
            self,
            cuModuleGetFunction(&mut function, module, name.as_ptr())
        );
        function
    }

    pub(crate) fn stream(&self) -> u64 {
        let mut stream = 0u64;
        cu!(self, cuStreamCreate(&mut stream, 1u32));
        stream
    }

    pub(crate) fn event(&self) -> u64 {
        let mut event = 0u64;
        cu!(self, cuEventCreate(&mut event, 2u32));
        event
    }

    /// Device memory with these values.
    pub(crate) fn put(&self, values: &[u32]) -> u64 {
        let bytes = size_of_val(values);
        let mut at = 0u64;
        cu!(self, cuMemAlloc_v2(&mut at, bytes));
        cu!(self, cuMemcpyHtoD_v2(at, values, bytes));
        at
    }

    pub(crate) fn get(&self, at: u64, n: usize) -> Vec<u32> {
        let mut values = vec![0u32; n];
        cu!(self, cuMemcpyDtoH_v2(&mut values[..], at, 4 * n));
        values
    }

    /// Launches with one block of `threads`.
    pub(crate) fn launch(&self, function: u64, stream: u64, threads: u32, params: &[u64]) {
        let pointers: Vec<*const u64> = params.iter().map(std::ptr::from_ref).collect();
        cu!(
            self,
            cuLaunchKernel(
                function,
                1u32,
                1u32,
                1u32,
                threads,
                1u32,
                1u32,
                0u32,
                stream,
                &pointers[..],
                0u64
            )
        );
    }

    /// Takes what the checks found.
    pub(crate) fn findings(&self) -> String {
        let (mut text, mut length) = (Vec::<u8>::new(), 1u64 << 16);
        // With too little room nothing is taken.
        while text.len() < length as usize {
            text.resize(length as usize, 0);
            cu!(
                self,
                vgpuTakeFindings(&mut text[..], text.len(), &mut length)
            );
        }
        text.truncate(length as usize - 1);
        String::from_utf8(text).expect("findings are text")
    }
}

/// Calls a C function of integers and pointers.
pub(crate) fn call(at: usize, args: &[u64]) -> u32 {
    macro_rules! with {
        ($($n:literal: $($arg:ident)*;)*) => {
            match args {
                $([$($arg),*] => {
                    type F = extern "C" fn($(with!(@ $arg)),*) -> u32;
                    // SAFETY: the address is a function of the library with as many arguments;
                    // on the platforms it runs on, narrow ones take the low bits of registers
                    // or stack slots of 64.
                    let f = unsafe { std::mem::transmute::<usize, F>(at) };
                    f($(*$arg),*)
                })*
                _ => panic!("{} arguments", args.len()),
            }
        };
        (@ $arg:ident) => { u64 };
    }
    with! {
        0: ;
        1: a;
        2: a b;
        3: a b c;
        4: a b c d;
        5: a b c d e;
        6: a b c d e f0;
        7: a b c d e f0 g;
        8: a b c d e f0 g h;
        9: a b c d e f0 g h i;
        10: a b c d e f0 g h i j;
        11: a b c d e f0 g h i j k;
    }
}

/// Kernels of one block: `add(p, v)` adds `v` to each word, `copy(to, from)` copies words,
/// `fault(p)` stores to an address where nothing is, `spin(p)` waits for a word to become 1.
pub(crate) const KERNELS: &str = r#"
.version 8.0
.target sm_80
.address_size 64
.global .align 4 .u32 counter = 7;
.visible .entry add(.param .u64 p, .param .u32 v)
{
    .reg .b32 %r<4>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd0, [p];
    ld.param.u32 %r0, [v];
    mov.u32 %r1, %tid.x;
    mul.wide.u32 %rd1, %r1, 4;
    add.s64 %rd0, %rd0, %rd1;
    ld.global.u32 %r2, [%rd0];
    add.u32 %r2, %r2, %r0;
    st.global.u32 [%rd0], %r2;
    ret;
}
.visible .entry copy(.param .u64 to, .param .u64 from)
{
    .reg .b32 %r<3>;
    .reg .b64 %rd<3>;
    ld.param.u64 %rd0, [to];
    ld.param.u64 %rd1, [from];
    mov.u32 %r0, %tid.x;
    mul.wide.u32 %rd2, %r0, 4;
    add.s64 %rd0, %rd0, %rd2;
    add.s64 %rd1, %rd1, %rd2;
    ld.global.u32 %r1, [%rd1];
    st.global.u32 [%rd0], %r1;
    ret;
}
.visible .entry fault(.param .u64 p)
{
    .reg .b64 %rd<2>;
    ld.param.u64 %rd0, [p];
    st.global.u32 [%rd0], 1;
    ret;
}
.visible .entry spin(.param .u64 p)
{
    .reg .pred %p;
    .reg .b32 %r;
    .reg .b64 %rd;
    ld.param.u64 %rd, [p];
again:
    ld.acquire.sys.global.u32 %r, [%rd];
    setp.ne.u32 %p, %r, 1;
    @%p bra again;
    ret;
}
"#;
