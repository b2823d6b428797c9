//! What can go wrong, as values.
//!
//! One enum, grouped by topic. Every message names the thing, what was expected, what was
//! found and the remedy, so that it can be read without the source at hand.

use std::fmt;
use std::path::Path;

use crate::backend::DriverError;
use crate::comm::CommError;
use crate::llama::sampling::SamplingError;

/// The result of everything in this crate that can fail.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of this crate.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file could not be opened, read or written.
    #[error("{0}")]
    Io(Fault),
    /// A model directory (config.json, weights, tokenizer) that cannot be used: everything
    /// that is wrong with it.
    #[error("{0}")]
    Model(Faults),
    /// A number of ranks that this model cannot be split over.
    #[error("{0}")]
    InvalidTp(InvalidTp),
    /// A request, batch or setting that cannot be served.
    #[error("{0}")]
    Input(Fault),
    /// Operands of an operation that do not fit each other.
    #[error("{0}")]
    Shape(Fault),
    /// Memory, or blocks of the KV cache, that are not there.
    #[error("{0}")]
    OutOfMemory(Fault),
    /// Ranks that lost each other.
    #[error(transparent)]
    Comm(#[from] CommError),
    /// A call of the CUDA driver that failed.
    #[error(transparent)]
    Driver(#[from] DriverError),
    /// Logits that no token can be chosen from.
    #[error(transparent)]
    Sampling(#[from] SamplingError),
}

impl Error {
    /// An I/O failure on `path` while doing `action` ("open", "read the header of" …).
    pub fn io(path: &Path, action: &str, error: &std::io::Error) -> Self {
        Self::Io(Fault::new(
            path.display(),
            format!("a file one can {action}"),
            error,
            "check the path and its permissions",
        ))
    }

    /// Bad input; see [`Fault::new`].
    pub fn input(
        what: impl fmt::Display,
        expected: impl fmt::Display,
        found: impl fmt::Display,
        remedy: impl fmt::Display,
    ) -> Self {
        Self::Input(Fault::new(what, expected, found, remedy))
    }

    /// Operands of operation `op` that do not fit.
    pub fn shape(
        op: impl fmt::Display,
        expected: impl fmt::Display,
        found: impl fmt::Display,
    ) -> Self {
        Self::Shape(Fault::new(
            op,
            expected,
            found,
            "pass operands of matching shapes",
        ))
    }

    /// A model directory with one fault.
    pub fn model(subject: impl fmt::Display, fault: Fault) -> Self {
        Self::Model(Faults::new(subject, vec![fault]))
    }

    /// Whether the caller's input is at fault (a command line exits with 2), rather than
    /// something that went wrong while running (it exits with 1).
    pub fn is_input(&self) -> bool {
        match self {
            Self::Comm(error) => matches!(error, CommError::Argument { .. }),
            Self::Driver(_) | Self::OutOfMemory(_) | Self::Sampling(_) => false,
            _ => true,
        }
    }
}

/// One thing that is wrong: what, expected, found, remedy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The thing that is wrong: a file, a field, a tensor, an operand.
    pub what: String,
    /// What was expected of it.
    pub expected: String,
    /// What was found instead.
    pub found: String,
    /// What the reader can do about it.
    pub remedy: String,
}

impl Fault {
    /// A fault; the parts become "`what`: expected `expected`, found `found`; `remedy`".
    pub fn new(
        what: impl fmt::Display,
        expected: impl fmt::Display,
        found: impl fmt::Display,
        remedy: impl fmt::Display,
    ) -> Self {
        Self {
            what: what.to_string(),
            expected: expected.to_string(),
            found: found.to_string(),
            remedy: remedy.to_string(),
        }
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}: expected {}, found {}; {}",
            self.what, self.expected, self.found, self.remedy
        )
    }
}

/// Lines of a message; a model that lacks all of its weights has tens of thousands.
const MAX_LINES: usize = 64;

/// All that is wrong with one subject, reported together; as text, the first of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Faults {
    /// The file or directory concerned.
    pub subject: String,
    /// The faults, at least one.
    pub list: Vec<Fault>,
}

impl Faults {
    /// The faults of `subject`.
    pub fn new(subject: impl fmt::Display, list: Vec<Fault>) -> Self {
        Self {
            subject: subject.to_string(),
            list,
        }
    }
}

impl fmt::Display for Faults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.list.as_slice() {
            [only] => write!(f, "{}: {only}", self.subject),
            list => {
                write!(f, "{}: {} defects", self.subject, list.len())?;
                let shown = &list[..list.len().min(MAX_LINES)];
                shown
                    .iter()
                    .try_for_each(|fault| write!(f, "\n  {fault}"))?;
                match list.len() - shown.len() {
                    0 => Ok(()),
                    more => write!(f, "\n  and {more} more"),
                }
            }
        }
    }
}

/// A number of ranks that a model cannot be split over, and those that it can.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct InvalidTp {
    /// The number asked for.
    pub tp: usize,
    /// Why it cannot be.
    pub reason: String,
    /// The numbers that can.
    pub valid: Vec<usize>,
}

impl fmt::Display for InvalidTp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let valid: Vec<_> = self.valid.iter().map(ToString::to_string).collect();
        write!(
            f,
            "tp: {} ranks are not possible: {}; choose one of {}",
            self.tp,
            self.reason,
            valid.join(", ")
        )
    }
}
