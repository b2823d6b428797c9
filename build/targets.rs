//! Which architectures are compiled for: arithmetic on names, tested by `tests/cuda_build.rs`.

/// What machine code is made for by default, as far as the compiler knows it: A100, H100, B200
/// and the consumer cards of that generation. Others run the PTX.
const DEFAULT: [&str; 4] = ["80", "90", "100", "120"];

/// The oldest architecture that the kernels are written for.
const OLDEST: u32 = 80;

/// The architectures of a build.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Targets {
    /// Machine code for these, such as `90` or `90a`.
    pub(crate) machine_code: Vec<String>,
    /// PTX for these.
    pub(crate) ptx: Vec<String>,
}

/// The number of an architecture: 90 of `90a`.
fn number(arch: &str) -> u32 {
    let digits = arch.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    digits.parse().unwrap_or(0)
}

/// One item of `CUDA_COMPUTE_CAP`: `90`, `9.0`, `90a`, `sm_90`, `compute_90`.
fn parse(item: &str) -> Result<String, String> {
    let bare = item
        .trim_start_matches("sm_")
        .trim_start_matches("compute_")
        .replace('.', "");
    let digits = bare.trim_end_matches(['a', 'f']);
    let suffix = bare.len() - digits.len();
    let number = digits.parse::<u32>().ok();
    match number {
        Some(number) if suffix <= 1 && number >= OLDEST => Ok(bare),
        Some(number) if suffix <= 1 => Err(format!(
            "CUDA_COMPUTE_CAP: {item:?} is architecture {number}; the kernels need {OLDEST} or newer"
        )),
        _ => Err(format!(
            "CUDA_COMPUTE_CAP: {item:?} is no compute capability; give a list such as 80,90 or 8.0,9.0a"
        )),
    }
}

impl Targets {
    /// From what is `wanted` (the value of `CUDA_COMPUTE_CAP`) or by default, what the compiler
    /// knows (`nvcc --list-gpu-code`; nothing if it could not say), and whether PTX is wanted for
    /// each or for the lowest only.
    pub(crate) fn choose(
        wanted: Option<&str>,
        known: &[String],
        ptx_per_arch: bool,
    ) -> Result<Self, String> {
        let knows = |arch: &str| {
            let family = arch.trim_end_matches(['a', 'f']);
            known.is_empty() || known.iter().any(|k| k == arch || k == family)
        };
        let mut machine_code: Vec<String> = match wanted {
            Some(list) => {
                let items = list.split([',', ';', ' ']).map(str::trim);
                let items = items.filter(|item| !item.is_empty());
                items.map(parse).collect::<Result<_, _>>()?
            }
            None => DEFAULT.map(String::from).to_vec(),
        };
        if wanted.is_some() {
            if let Some(unknown) = machine_code.iter().find(|arch| !knows(arch)) {
                return Err(format!(
                    "CUDA_COMPUTE_CAP: this nvcc does not know sm_{unknown} (it knows {}); take \
                     it off the list or use a newer toolkit",
                    known.join(", ")
                ));
            }
        } else {
            machine_code.retain(|arch| knows(arch));
        }
        machine_code.sort_by_key(|arch| (number(arch), arch.clone()));
        machine_code.dedup();
        let Some(lowest) = machine_code.first() else {
            return Err(match wanted {
                Some(_) => {
                    "CUDA_COMPUTE_CAP: the list is empty; unset it or give one such as 80,90"
                        .to_owned()
                }
                None => format!(
                    "nvcc knows none of the architectures {} (it knows {}); use a newer toolkit or \
                     set CUDA_COMPUTE_CAP",
                    DEFAULT.join(", "),
                    known.join(", ")
                ),
            });
        };
        let ptx = if ptx_per_arch {
            machine_code.clone()
        } else {
            vec![lowest.clone()]
        };
        Ok(Self { machine_code, ptx })
    }

    /// The arguments of nvcc for code that each architecture gets of its own.
    pub(crate) fn arguments(&self) -> Vec<String> {
        let mut arguments = Vec::new();
        for arch in &self.machine_code {
            let code = if self.ptx.contains(arch) {
                format!("[compute_{arch},sm_{arch}]")
            } else {
                format!("sm_{arch}")
            };
            arguments.push(format!("-gencode=arch=compute_{arch},code={code}"));
        }
        arguments
    }

    /// The arguments of nvcc for code that is the same on all architectures: PTX for the lowest,
    /// from which the machine code of all is made.
    pub(crate) fn arguments_in_common(&self) -> Vec<String> {
        // PTX for `90a` would be for that one alone.
        let numbers = self.machine_code.iter().map(|arch| number(arch));
        let lowest = numbers.min().unwrap_or(OLDEST);
        let mut code = format!("compute_{lowest}");
        for arch in &self.machine_code {
            code += &format!(",sm_{arch}");
        }
        vec![format!("-gencode=arch=compute_{lowest},code=[{code}]")]
    }
}

/// The architectures in what `nvcc --list-gpu-code` prints.
pub(crate) fn parse_list(text: &str) -> Vec<String> {
    text.split_whitespace()
        .filter_map(|word| word.strip_prefix("sm_"))
        .map(String::from)
        .collect()
}

/// Major and minor of the release in what `nvcc --version` prints.
pub(crate) fn parse_release(text: &str) -> Option<(u32, u32)> {
    let (_, rest) = text.split_once("release ")?;
    let number = rest.split([',', ' ', '\n']).next()?;
    let (major, minor) = number.split_once('.')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// The files in a dependency file of make: all words after the first colon that ends one, with
/// `\` at line ends left out and `\ ` meaning a blank.
pub(crate) fn parse_dependencies(text: &str) -> Vec<String> {
    let Some((_, files)) = text.split_once(": ") else {
        return Vec::new();
    };
    let joined = files.replace("\\\r\n", " ").replace("\\\n", " ");
    let mut list = vec![String::new()];
    let mut characters = joined.chars().peekable();
    while let Some(c) = characters.next() {
        let last = list.last_mut().expect("never empty");
        match c {
            '\\' if characters.peek() == Some(&' ') => {
                characters.next();
                last.push(' ');
            }
            c if c.is_whitespace() => list.push(String::new()),
            c => last.push(c),
        }
    }
    list.retain(|file| !file.is_empty());
    list
}
