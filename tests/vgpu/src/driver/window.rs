//! Addresses. Those of the devices' memory are set aside in the process, so that the host faults
//! where it follows one, and is told why; pinned memory lies where it lies in every process, so
//! that kernels that look at addresses run the same from the same seed.

use std::cell::UnsafeCell;
use std::io::Error;
use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicU64, Ordering};

use super::explain;

/// The first address of the memory that is pinned in contexts of device 0, and how many addresses
/// each device has for that.
const FIRST_PINNED: u64 = 0x2000_0000_0000;
const PINNED_WINDOW: u64 = 1 << 38;
const PAGE: u64 = 4096;

/// Where the next memory pinned for each device lies. Nothing is handed out twice.
pub(super) struct Pinned(Vec<u64>);

impl Pinned {
    pub(super) fn new(devices: u32) -> Self {
        let windows = 0..u64::from(devices);
        Self(windows.map(|d| FIRST_PINNED + d * PINNED_WINDOW).collect())
    }

    /// Pages, all zero, that cost nothing until they are touched, and whether they lie where they
    /// do in every process; None if there are none.
    pub(super) fn map(&mut self, device: u32, bytes: u64) -> Option<(*mut u8, bool)> {
        let next = self.0.get_mut(device as usize)?;
        let wanted = *next;
        // A page between two, so that a small step beyond one is outside all.
        let after = bytes.checked_next_multiple_of(PAGE)?.checked_add(PAGE)?;
        *next = next.checked_add(after)?;
        let access = libc::PROT_READ | libc::PROT_WRITE;
        if let Ok(at) = map(wanted, bytes, access) {
            return Some((at, true));
        }
        map(0, bytes, access).ok().map(|at| (at, false))
    }
}

/// New pages at an address where nothing is, or anywhere for 0.
fn map(at: u64, bytes: u64, access: libc::c_int) -> Result<*mut u8, Error> {
    let bytes = usize::try_from(bytes).map_err(|_| Error::from_raw_os_error(libc::ENOMEM))?;
    let mut kind = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
    if at != 0 {
        kind |= libc::MAP_FIXED_NOREPLACE;
    }
    // SAFETY: new pages; nothing that is mapped is replaced.
    let mapped = unsafe { libc::mmap(at as *mut libc::c_void, bytes, access, kind, -1, 0) };
    if mapped == libc::MAP_FAILED {
        return Err(Error::last_os_error());
    }
    if at != 0 && mapped as u64 != at {
        // A kernel that does not know the flag takes the address for a wish.
        // SAFETY: just mapped, and nobody knows of it.
        unsafe { libc::munmap(mapped, bytes) };
        return Err(Error::from_raw_os_error(libc::EEXIST));
    }
    Ok(mapped.cast())
}

/// Sets the devices' addresses aside, so that the host faults on them.
pub(super) fn reserve(first: u64, end: u64, of_one: u64) {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if let Err(error) = map(first, end - first, libc::PROT_NONE) {
            explain(
                "cuInit",
                format_args!(
                    "{first:#x} to {end:#x} cannot be set aside for the devices: {error}; a host \
                     that follows their pointers may not fault"
                ),
            );
        }
        FIRST.store(first, Ordering::Relaxed);
        END.store(end, Ordering::Relaxed);
        OF_ONE.store(of_one, Ordering::Relaxed);
        watch();
    });
}

static FIRST: AtomicU64 = AtomicU64::new(0);
static END: AtomicU64 = AtomicU64::new(0);
static OF_ONE: AtomicU64 = AtomicU64::new(1);

/// What the program does about segmentation faults.
struct Before(UnsafeCell<MaybeUninit<libc::sigaction>>);

// SAFETY: written once, before the handler that reads it is there.
unsafe impl Sync for Before {}

static BEFORE: Before = Before(UnsafeCell::new(MaybeUninit::uninit()));

fn watch() {
    // SAFETY: all zero is a value of the type.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = told as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    let before = BEFORE.0.get();
    // SAFETY: the first call only asks, and writes to a place that nobody reads yet; the second
    // installs a function that does nothing a signal handler must not do.
    unsafe {
        if libc::sigaction(libc::SIGSEGV, std::ptr::null(), before.cast()) == 0 {
            libc::sigaction(libc::SIGSEGV, &action, std::ptr::null_mut());
        }
    }
}

/// Says what is wrong with an address of a device, and leaves the rest to whoever was there before:
/// the access faults again.
extern "C" fn told(signal: libc::c_int, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the system gives a handler of this kind its information.
    let at = unsafe { (*info).si_addr() } as u64;
    let (first, end) = (FIRST.load(Ordering::Relaxed), END.load(Ordering::Relaxed));
    if (first..end).contains(&at) {
        let device = (at - first) / OF_ONE.load(Ordering::Relaxed);
        let mut words = Words::default();
        words.put(b"vgpu: the host follows the pointer ");
        words.hex(at);
        words.put(b", which is to memory of device ");
        words.decimal(device);
        words.put(b": only kernels and copies reach it\n");
        // SAFETY: writes bytes of our own; whether they arrive does not matter.
        unsafe { libc::write(2, words.bytes.as_ptr().cast(), words.len) };
    }
    // SAFETY: what `watch` kept.
    unsafe { libc::sigaction(signal, BEFORE.0.get().cast(), std::ptr::null_mut()) };
}

/// A text that needs no allocation.
struct Words {
    bytes: [u8; 160],
    len: usize,
}

impl Default for Words {
    fn default() -> Self {
        Self {
            bytes: [0; 160],
            len: 0,
        }
    }
}

impl Words {
    fn put(&mut self, text: &[u8]) {
        for &byte in text {
            if let Some(place) = self.bytes.get_mut(self.len) {
                *place = byte;
                self.len += 1;
            }
        }
    }

    fn hex(&mut self, value: u64) {
        self.put(b"0x");
        let digits = (64 - value.leading_zeros()).div_ceil(4).max(1);
        for digit in (0..digits).rev() {
            self.put(&[b"0123456789abcdef"[(value >> (4 * digit)) as usize & 15]]);
        }
    }

    fn decimal(&mut self, value: u64) {
        if value >= 10 {
            self.decimal(value / 10);
        }
        self.put(&[b'0' + (value % 10) as u8]);
    }
}
