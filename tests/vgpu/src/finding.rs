//! What the checks report: a finding names the kind, the kernel, the place in the source, who did
//! it and where, in words; a fault is what the hardware would have done about it.

use std::collections::HashSet;
use std::fmt;

/// What went wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// An access outside every allocation, or beyond the bytes asked for.
    OutOfBounds,
    /// An address that is no multiple of the access's size.
    Misaligned,
    /// An access to memory that was freed, or a free of it.
    UseAfterFree,
    /// A value nobody wrote decides a branch, an address or a stored result.
    Uninitialised,
    /// Two accesses to the same bytes, one of them a write, that nothing orders.
    Race,
    /// A `.sync` operation whose member mask leaves out the caller, or names lanes that never come.
    WrongMask,
    /// Threads of a warp or block that should meet at a barrier and cannot.
    Barrier,
    /// Nothing can advance any more.
    Deadlock,
    /// A write to memory that may only be read.
    ReadOnly,
    /// An access to memory of another device that this one may not, or cannot, make.
    PeerAccess,
    /// A failed device-side `assert`, `trap`, or an instruction that may not be executed so.
    Trap,
}

impl Kind {
    /// Every kind there is.
    pub const ALL: [Kind; 11] = [
        Kind::OutOfBounds,
        Kind::Misaligned,
        Kind::UseAfterFree,
        Kind::Uninitialised,
        Kind::Race,
        Kind::WrongMask,
        Kind::Barrier,
        Kind::Deadlock,
        Kind::ReadOnly,
        Kind::PeerAccess,
        Kind::Trap,
    ];

    /// The name used in reports and in `VGPU_CHECK`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::OutOfBounds => "out-of-bounds",
            Kind::Misaligned => "misaligned",
            Kind::UseAfterFree => "use-after-free",
            Kind::Uninitialised => "uninitialised",
            Kind::Race => "race",
            Kind::WrongMask => "wrong-mask",
            Kind::Barrier => "barrier",
            Kind::Deadlock => "deadlock",
            Kind::ReadOnly => "read-only",
            Kind::PeerAccess => "peer-access",
            Kind::Trap => "trap",
        }
    }
}

/// A place in the code.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default)]
pub struct Place {
    /// The kernel's name.
    pub kernel: String,
    /// Line in the PTX text.
    pub ptx_line: u32,
    /// `norm.cu:88`, where the PTX has line information (the innermost place, with the places it
    /// was inlined into after it).
    pub source: Vec<(String, u32)>,
    /// The instruction, `ld.global.v4.f32`.
    pub instruction: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} in {}", self.instruction, self.kernel)?;
        for (i, (file, line)) in self.source.iter().enumerate() {
            let word = if i == 0 { "at" } else { "inlined into" };
            write!(f, " {word} {file}:{line}")?;
        }
        write!(f, " (PTX line {})", self.ptx_line)
    }
}

/// Who did it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
pub struct Thread {
    /// The device's ordinal.
    pub device: u32,
    /// `blockIdx`.
    pub block: [u32; 3],
    /// `threadIdx`.
    pub thread: [u32; 3],
}

impl fmt::Display for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let ([bx, by, bz], [tx, ty, tz]) = (self.block, self.thread);
        write!(
            f,
            "device {}, block ({bx},{by},{bz}), thread ({tx},{ty},{tz})",
            self.device
        )
    }
}

/// Why two accesses race: what is missing between them, for those who test for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Reason {
    /// Nothing stands between them, not even a flag that failed.
    Unordered,
    /// One goes through the non-coherent path (`.nc`) and the other writes.
    NonCoherent,
    /// The flag between them is stored relaxed, with no fence before it in its thread.
    FlagRelaxed,
    /// The flag is stored relaxed; a fence stands in another thread of its block instead.
    FenceElsewhere,
    /// The flag was released at a scope that does not reach its reader.
    ReleaseTooNarrow,
    /// The flag was acquired at a scope that does not reach its writer.
    AcquireTooNarrow,
    /// The flag is read relaxed, with no fence after it in its thread.
    FlagReadRelaxed,
    /// One of them is weak and the other strong: the flag itself is read weakly.
    FlagReadWeakly,
    /// One of them is weak and the other strong: the flag itself is written weakly.
    FlagWrittenWeakly,
    /// The flag is an element of the vector that carries the data: elements have no order.
    VectorElements,
    /// Both are strong, but a scope leaves the other thread out.
    ScopeTooNarrow,
    /// Both are strong, but of different sizes, so that they overlap only in part.
    MixedSizes,
}

impl Reason {
    /// Every reason there is.
    pub const ALL: [Reason; 12] = [
        Reason::Unordered,
        Reason::NonCoherent,
        Reason::FlagRelaxed,
        Reason::FenceElsewhere,
        Reason::ReleaseTooNarrow,
        Reason::AcquireTooNarrow,
        Reason::FlagReadRelaxed,
        Reason::FlagReadWeakly,
        Reason::FlagWrittenWeakly,
        Reason::VectorElements,
        Reason::ScopeTooNarrow,
        Reason::MixedSizes,
    ];

    /// A name for tests.
    pub fn name(self) -> &'static str {
        match self {
            Reason::Unordered => "unordered",
            Reason::NonCoherent => "non-coherent",
            Reason::FlagRelaxed => "flag-relaxed",
            Reason::FenceElsewhere => "fence-elsewhere",
            Reason::ReleaseTooNarrow => "release-too-narrow",
            Reason::AcquireTooNarrow => "acquire-too-narrow",
            Reason::FlagReadRelaxed => "flag-read-relaxed",
            Reason::FlagReadWeakly => "flag-read-weakly",
            Reason::FlagWrittenWeakly => "flag-written-weakly",
            Reason::VectorElements => "vector-elements",
            Reason::ScopeTooNarrow => "scope-too-narrow",
            Reason::MixedSizes => "mixed-sizes",
        }
    }
}

/// One report of a check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What went wrong.
    pub kind: Kind,
    /// Where; None for what the host did.
    pub place: Option<Place>,
    /// Who; None for what the host did.
    pub thread: Option<Thread>,
    /// The first byte concerned.
    pub address: Option<u64>,
    /// The other access of a race.
    pub other: Option<(Option<Place>, Option<Thread>)>,
    /// What is missing between the two accesses of a race.
    pub reason: Option<Reason>,
    /// What happened, in a sentence.
    pub message: String,
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.kind.name(), self.message)?;
        // A race tells of both accesses in its sentence.
        if self.kind == Kind::Race
            && let Some(address) = self.address
        {
            return write!(f, "; address {address:#x}");
        }
        if let Some(place) = &self.place {
            write!(f, "; {place}")?;
        }
        if let Some(thread) = &self.thread {
            write!(f, "; {thread}")?;
        }
        if let Some(address) = self.address {
            write!(f, "; address {address:#x}")?;
        }
        if let Some((place, thread)) = &self.other {
            write!(f, "; the other access: ")?;
            match place {
                Some(place) => write!(f, "{place}")?,
                None => write!(f, "the host")?,
            }
            if let Some(thread) = thread {
                write!(f, "; {thread}")?;
            }
        }
        Ok(())
    }
}

/// What makes two findings one: the kind, and the lines of source (or of PTX) concerned. The
/// copies of an unrolled loop are one line; a race is one cause whichever side comes first.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
struct Cause {
    kind: Kind,
    lines: Vec<(String, String, u32)>,
}

impl Cause {
    fn of(finding: &Finding) -> Self {
        let other = finding.other.as_ref().and_then(|o| o.0.as_ref());
        let mut lines: Vec<_> = finding
            .place
            .iter()
            .chain(other)
            .map(|place| match place.source.first() {
                Some((file, line)) => (place.kernel.clone(), file.clone(), *line),
                None => (place.kernel.clone(), String::new(), place.ptx_line),
            })
            .collect();
        lines.sort_unstable();
        Self {
            kind: finding.kind,
            lines,
        }
    }
}

/// The findings of a run, one for each cause.
#[derive(Debug, Default)]
pub struct Findings {
    list: Vec<Finding>,
    causes: HashSet<Cause>,
    operations: HashSet<(Kind, u32)>,
    /// Kernels in which a race let a thread read what another had yet to write: values that
    /// nobody wrote are then its consequence.
    racing: HashSet<String>,
    off: Vec<Kind>,
}

impl Findings {
    /// None yet; only these kinds will be kept.
    pub fn new(checks: &[Kind]) -> Self {
        Self {
            off: Kind::ALL
                .into_iter()
                .filter(|kind| !checks.contains(kind))
                .collect(),
            ..Self::default()
        }
    }

    /// Whether an operation has not been asked about with this kind before: cheap enough for
    /// checks that may fail a million times.
    pub fn is_first(&mut self, kind: Kind, operation: u32) -> bool {
        self.operations.insert((kind, operation))
    }

    /// Keeps a finding unless its cause is known or its check is off.
    pub fn report(&mut self, finding: Finding) {
        if !self.off.contains(&finding.kind) && self.causes.insert(Cause::of(&finding)) {
            self.list.push(finding);
        }
    }

    /// A race in this kernel let a thread read what another had yet to write.
    pub fn excuse_unwritten(&mut self, kernel: &str) {
        self.racing.insert(kernel.to_owned());
    }

    fn is_consequence(&self, finding: &Finding) -> bool {
        finding.kind == Kind::Uninitialised
            && finding
                .place
                .as_ref()
                .is_some_and(|place| self.racing.contains(&place.kernel))
    }

    /// All of them, in the order they were found.
    pub fn list(&self) -> impl Iterator<Item = &Finding> {
        self.list.iter().filter(|f| !self.is_consequence(f))
    }

    /// Takes them, so that what comes next starts afresh.
    pub fn take(&mut self) -> Vec<Finding> {
        let taken = self.list().cloned().collect();
        self.list.clear();
        self.causes.clear();
        self.operations.clear();
        self.racing.clear();
        taken
    }
}

/// What the hardware does about an error: it ends the context, with this code of the driver API.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// `CUDA_ERROR_ILLEGAL_ADDRESS`
    IllegalAddress,
    /// `CUDA_ERROR_MISALIGNED_ADDRESS`
    MisalignedAddress,
    /// `CUDA_ERROR_INVALID_ADDRESS_SPACE`
    InvalidAddressSpace,
    /// `CUDA_ERROR_INVALID_PC`
    InvalidPc,
    /// `CUDA_ERROR_ILLEGAL_INSTRUCTION`
    IllegalInstruction,
    /// `CUDA_ERROR_HARDWARE_STACK_ERROR`
    HardwareStack,
    /// `CUDA_ERROR_ASSERT`
    Assert,
    /// `CUDA_ERROR_LAUNCH_FAILED`: `trap`, and everything without a code of its own.
    LaunchFailed,
    /// `CUDA_ERROR_LAUNCH_TIMEOUT`: nothing can advance any more.
    LaunchTimeout,
    /// `CUDA_ERROR_NVLINK_UNCORRECTABLE`: the link, or the device behind it, is dead.
    NvlinkUncorrectable,
    /// `CUDA_ERROR_ECC_UNCORRECTABLE`: the device is dead.
    EccUncorrectable,
}

impl Fault {
    /// The code of the driver API.
    pub fn code(self) -> u32 {
        match self {
            Fault::EccUncorrectable => 214,
            Fault::NvlinkUncorrectable => 220,
            Fault::IllegalAddress => 700,
            Fault::LaunchTimeout => 702,
            Fault::Assert => 710,
            Fault::HardwareStack => 714,
            Fault::IllegalInstruction => 715,
            Fault::MisalignedAddress => 716,
            Fault::InvalidAddressSpace => 717,
            Fault::InvalidPc => 718,
            Fault::LaunchFailed => 719,
        }
    }
}
