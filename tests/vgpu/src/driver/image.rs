//! Images of modules: PTX text, fatbins, and the wrapper that the CUDA runtime puts around them.
//!
//! An image comes as a pointer without a length: what it says of its own size may be wrong, and
//! so may the pointer. It is read through the kernel, which says what is not there instead of
//! ending the process.

use super::explain;
use super::module::words;
use super::status::{In, Status};
use crate::fatbin;

const NAME: &str = "cuModuleLoadData";
/// The longest PTX text taken.
const LONGEST: usize = 256 << 20;
/// Bytes read at a time, and what reads begin at a multiple of: a page.
const PIECE: usize = 4096;

/// An image.
pub(super) enum Image {
    /// In the caller's memory.
    Pointer(u64),
    /// From a file.
    Bytes(Vec<u8>),
}

impl Image {
    pub(super) fn at(image: In<u8>) -> Self {
        Image::Pointer(image.address())
    }

    /// The image in a file.
    pub(super) fn read(path: In<u8>) -> Result<Self, Status> {
        let bytes = std::fs::read(words(path)?).map_err(|_| Status::FILE_NOT_FOUND)?;
        Ok(Image::Bytes(bytes))
    }

    /// The first bytes, as many of `n` as are there.
    fn bytes(&self, n: usize) -> Vec<u8> {
        match self {
            Image::Pointer(at) => read_memory(*at, n),
            Image::Bytes(bytes) => bytes[..n.min(bytes.len())].to_vec(),
        }
    }

    /// The bytes before the first zero.
    fn text(&self) -> Vec<u8> {
        let before_zero = |bytes: &[u8]| bytes.iter().position(|&b| b == 0);
        match self {
            Image::Bytes(bytes) => {
                let end = before_zero(bytes).unwrap_or(bytes.len());
                bytes[..end].to_vec()
            }
            Image::Pointer(at) => {
                let mut text = Vec::new();
                while text.len() < LONGEST {
                    let here = at.wrapping_add(text.len() as u64);
                    let Some(piece) = read_page(here, PIECE) else {
                        break;
                    };
                    let end = before_zero(&piece);
                    text.extend(&piece[..end.unwrap_or(piece.len())]);
                    if end.is_some() {
                        break;
                    }
                }
                text
            }
        }
    }

    /// All that the image says it is: a fatbin as long as its header has it, or text.
    pub(super) fn content(&self) -> Result<Vec<u8>, Status> {
        let mut head = self.bytes(16);
        if head.is_empty() {
            return Err(match self {
                Image::Pointer(_) => Status::INVALID_VALUE,
                Image::Bytes(_) => Status::INVALID_IMAGE,
            });
        }
        if fatbin::is_wrapper(&head) && head.len() == 16 {
            let inner = head.split_off(8);
            let inner = inner.try_into().map_err(|_| Status::INVALID_IMAGE)?;
            let inner = Image::Pointer(u64::from_le_bytes(inner));
            if fatbin::is_fatbin(&inner.bytes(4)) {
                return inner.content();
            }
            explain(NAME, "a wrapper with no fatbin in it");
            return Err(Status::INVALID_IMAGE);
        }
        if fatbin::is_elf(&head) {
            explain(
                NAME,
                "machine code; the virtual GPU runs PTX: compile with code=compute_XX",
            );
            return Err(Status::NO_BINARY_FOR_GPU);
        }
        if fatbin::is_fatbin(&head) {
            let size = fatbin::size(&head).map_err(refuse)?;
            return Ok(self.bytes(size));
        }
        Ok(self.text())
    }
}

fn refuse(error: fatbin::FatbinError) -> Status {
    explain(NAME, error);
    Status::INVALID_IMAGE
}

/// The PTX in an image's content, for a device of this architecture.
pub(super) fn ptx(content: &[u8], arch: u32) -> Result<String, Status> {
    if fatbin::is_fatbin(content) {
        let texts = fatbin::texts(content).map_err(refuse)?;
        let chosen = fatbin::choose(texts, arch).map_err(|error| {
            explain(NAME, error);
            Status::NO_BINARY_FOR_GPU
        })?;
        return Ok(chosen.ptx);
    }
    String::from_utf8(content.to_vec()).map_err(|_| {
        explain(NAME, "the image is neither PTX nor a fatbin");
        Status::INVALID_IMAGE
    })
}

/// Reads memory of this process, up to the first page that is not there.
fn read_memory(at: u64, n: usize) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < n {
        let left = n - bytes.len();
        match read_page(at.wrapping_add(bytes.len() as u64), left) {
            Some(piece) => bytes.extend(piece),
            None => break,
        }
    }
    bytes
}

/// Reads at most `most` bytes from an address to the end of its page; None if it is not there.
fn read_page(at: u64, most: usize) -> Option<Vec<u8>> {
    let n = most.min(PIECE - at as usize % PIECE);
    let mut bytes = vec![0u8; n];
    let local = libc::iovec {
        iov_base: bytes.as_mut_ptr().cast(),
        iov_len: n,
    };
    let remote = libc::iovec {
        iov_base: at as *mut libc::c_void,
        iov_len: n,
    };
    // SAFETY: writes only to `bytes`; what cannot be read at `at` is reported.
    let read = unsafe { libc::process_vm_readv(libc::getpid(), &local, 1, &remote, 1, 0) };
    if read < 0 && std::io::Error::last_os_error().raw_os_error() != Some(libc::EFAULT) {
        // The system forbids the call: the caller's word has to do.
        return In::at(at).bytes(n).ok();
    }
    (read == n as isize).then_some(bytes)
}
