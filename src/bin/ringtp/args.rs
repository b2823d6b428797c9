//! The arguments of the command line.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use clap::{ArgMatches, Args, Parser, Subcommand, ValueEnum};
use ringtp::DType;
use ringtp::generate::{Llm, LlmBuilder, Message, Prompt, SamplingParams};

/// Tensor-parallel Llama inference.
///
/// A model is a directory as Hugging Face has them: config.json, weights as safetensors
/// (whole, or several files with an index), and for text tokenizer.json. It is split over
/// --tp ranks, each a thread of this process with its own slices of the weights.
///
/// Results go to standard output, everything else to standard error. Exit codes: 0 done,
/// 1 something failed while running, 2 bad input.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, max_term_width = 100)]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Continue prompts, streaming the text
    Generate(GenerateArgs),
    /// Write the logits of every position of a sequence to a file
    Logits(LogitsArgs),
    /// Show which slice of which tensor each rank holds, and check that they fit together
    Shards(ShardsArgs),
    /// Look at the CUDA devices and the links between them, and test every link
    Doctor(DoctorArgs),
    /// Measure a collective, or a model
    Bench(BenchArgs),
}

/// Continue prompts.
///
/// One prompt is streamed as it is generated; of several, each is printed when it is done.
/// Where neither the command line nor the model's generation_config.json asks for sampling,
/// the most probable token is taken. The tokens of a prompt do not depend on the other
/// prompts, on --max-batch-tokens or on --threads (on devices: with --batch-invariant). At the
/// end standard error gets the speed of prefill and decode, the time in collectives, and each
/// rank's memory by what it is for.
#[derive(Debug, Args)]
#[command(after_long_help = "\
Examples:
  ringtp generate --model DIR --prompt 'It is a truth' --tp 4 --temperature 0.7 --seed 1
  ringtp generate --model DIR --chat --prompt 'What is a ring all-reduce?' --max-tokens 200
  ringtp generate --model DIR --ids 1,15,27 --ids 1,99 --json

With --json there is one object a line for each prompt, in the order of the prompts:
  {\"index\":0,\"ids\":[..],\"text\":\"..\",\"finish_reason\":\"stop\",
   \"usage\":{\"prompt_tokens\":3,\"completion_tokens\":8,\"total_tokens\":11},\"seed\":1}
`ids` are the generated ones, the one that ended the text included; `text` is null for --ids;
`finish_reason` is stop (end of text, --stop, --stop-id) or length (--max-tokens, context).")]
pub(crate) struct GenerateArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    #[command(flatten)]
    pub(crate) prompts: PromptArgs,
    #[command(flatten)]
    pub(crate) sampling: SamplingArgs,
    /// The most rows computed in one step; longer prompts are computed in chunks
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        default_value_t = 512,
        help_heading = "Execution"
    )]
    pub(crate) max_batch_tokens: usize,
    /// Print one JSON object a line for each prompt
    #[arg(long)]
    pub(crate) json: bool,
}

/// Where ranks run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Device {
    /// Threads on the host
    Cpu,
    /// A CUDA device each
    Cuda,
}

#[derive(Debug, Args)]
pub(crate) struct ModelArgs {
    /// The model directory
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// The number of ranks; where it is impossible, the error lists the possible ones
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        default_value_t = 1,
        help_heading = "Execution"
    )]
    pub(crate) tp: usize,
    /// Where the ranks run; cuda is devices 0, 1 and so on, and needs a build with the feature
    #[arg(
        long,
        value_enum,
        value_name = "DEVICE",
        default_value_t = Device::Cpu,
        help_heading = "Execution"
    )]
    pub(crate) device: Device,
    /// The CUDA device of each rank, such as 0,0,1; sets --tp and --device
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "LIST",
        conflicts_with = "tp",
        help_heading = "Execution"
    )]
    pub(crate) devices: Vec<usize>,
    /// How weights and KV cache are stored; auto is as in the checkpoint. Sums are f32 always
    #[arg(
        long,
        value_name = "TYPE",
        default_value = "auto",
        help_heading = "Execution"
    )]
    pub(crate) dtype: Storage,
    /// The threads of all ranks together [default: one a core]
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        help_heading = "Execution"
    )]
    pub(crate) threads: Option<usize>,
    /// A context shorter than the model's, in tokens: a smaller KV cache
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        help_heading = "Execution"
    )]
    pub(crate) max_model_len: Option<usize>,
    /// The all-reduce between the ranks, by name [default: chosen by size]
    #[arg(long, value_name = "NAME", help_heading = "Execution")]
    pub(crate) all_reduce: Option<String>,
    /// The same bits whatever --tp is; sends about half as many bytes again between the ranks
    #[arg(long, help_heading = "Execution")]
    pub(crate) tp_invariant: bool,
    /// Each rank adds and normalises its part of the rows; the same bits and bytes
    #[arg(long, help_heading = "Execution")]
    pub(crate) sequence_parallel: bool,
    /// The same bits whatever else is in a step, on devices too, where steps of few rows get slower
    #[arg(long, help_heading = "Execution")]
    pub(crate) batch_invariant: bool,
    /// How many seconds a rank waits for another before all give up [default: the library's]
    #[arg(long, allow_negative_numbers = true, value_name = "SECONDS", value_parser = deadline, help_heading = "Execution")]
    pub(crate) deadline: Option<Duration>,
}

/// The device of each of a model's ranks: those that are listed, or the first `tp`; `None` on threads.
pub(crate) fn devices(device: Device, listed: &[usize], tp: usize) -> Option<Vec<usize>> {
    match device {
        _ if !listed.is_empty() => Some(listed.to_vec()),
        Device::Cuda => Some((0..tp).collect()),
        Device::Cpu => None,
    }
}

impl ModelArgs {
    /// The number of ranks.
    pub(crate) fn ranks(&self) -> usize {
        match self.devices.len() {
            0 => self.tp,
            devices => devices,
        }
    }

    pub(crate) fn builder(&self) -> LlmBuilder {
        let devices = devices(self.device, &self.devices, self.tp);
        let builder = Llm::builder(&self.model)
            .tp(self.ranks())
            .devices(devices)
            .dtype(self.dtype.0)
            .tp_invariant(self.tp_invariant)
            .sequence_parallel(self.sequence_parallel)
            .batch_invariant(self.batch_invariant)
            .threads(self.threads)
            .max_model_len(self.max_model_len)
            .all_reduce(self.all_reduce.clone());
        match self.deadline {
            Some(deadline) => builder.deadline(deadline),
            None => builder,
        }
    }
}

#[derive(Debug, Args)]
pub(crate) struct PromptArgs {
    /// A prompt; may be given several times
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        help_heading = "Prompts"
    )]
    prompt: Vec<String>,
    /// A prompt as token ids: no tokenizer is needed or used; may be given several times
    #[arg(
        long,
        value_name = "1,2,3",
        allow_hyphen_values = true,
        help_heading = "Prompts"
    )]
    ids: Vec<Ids>,
    /// Take each --prompt as a user's message and apply the model's chat template
    #[arg(long, requires = "prompt", help_heading = "Prompts")]
    chat: bool,
    /// A system message before the user's; with --chat
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        requires = "chat",
        help_heading = "Prompts"
    )]
    system: Option<String>,
}

impl PromptArgs {
    /// The prompts in the order of the command line, texts and ids mixed.
    pub(crate) fn in_order(&self, matches: &ArgMatches) -> Vec<Prompt> {
        let places = |name| matches.indices_of(name).into_iter().flatten();
        let texts = self.prompt.iter().map(|text| self.text(text));
        let ids = self.ids.iter().map(|ids| Prompt::Ids(ids.0.clone()));
        let mut all: Vec<_> = places("prompt").zip(texts).collect();
        all.extend(places("ids").zip(ids));
        all.sort_by_key(|&(place, _)| place);
        all.into_iter().map(|(_, prompt)| prompt).collect()
    }

    fn text(&self, text: &str) -> Prompt {
        if !self.chat || text.is_empty() {
            return Prompt::Text(text.into());
        }
        let system = self.system.iter().map(Message::system);
        Prompt::Chat(system.chain([Message::user(text)]).collect())
    }
}

#[derive(Debug, Args)]
pub(crate) struct SamplingArgs {
    /// The most tokens to generate for each prompt
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        default_value_t = 128,
        help_heading = "Sampling"
    )]
    max_tokens: usize,
    /// Flattens (above 1) or sharpens (below) the distribution; 0 takes the most probable token
    #[arg(
        long,
        value_name = "T",
        allow_hyphen_values = true,
        help_heading = "Sampling"
    )]
    temperature: Option<f32>,
    /// Only from the K most probable tokens; 0 is all
    #[arg(
        long,
        value_name = "K",
        allow_hyphen_values = true,
        help_heading = "Sampling"
    )]
    top_k: Option<usize>,
    /// Only from the fewest tokens whose probabilities reach P, in (0, 1]
    #[arg(
        long,
        value_name = "P",
        allow_hyphen_values = true,
        help_heading = "Sampling"
    )]
    top_p: Option<f32>,
    /// Only from tokens at least P times as probable as the best, in [0, 1]
    #[arg(
        long,
        value_name = "P",
        allow_hyphen_values = true,
        help_heading = "Sampling"
    )]
    min_p: Option<f32>,
    /// Makes tokens seen before less probable (above 1)
    #[arg(
        long,
        value_name = "R",
        allow_hyphen_values = true,
        help_heading = "Sampling"
    )]
    repetition_penalty: Option<f32>,
    /// The key of the random numbers: the same seed gives the same tokens [default: drawn]
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        help_heading = "Sampling"
    )]
    seed: Option<u64>,
    /// A text that ends the completion, not printed; may be given several times
    #[arg(
        long,
        value_name = "TEXT",
        allow_hyphen_values = true,
        help_heading = "Sampling"
    )]
    stop: Vec<String>,
    /// A token id that ends the completion; may be given several times
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "ID",
        help_heading = "Sampling"
    )]
    stop_id: Vec<u32>,
    /// Go on after the model's end-of-text ids, up to --max-tokens
    #[arg(long, help_heading = "Sampling")]
    ignore_eos: bool,
}

impl SamplingArgs {
    pub(crate) fn params(&self) -> SamplingParams {
        SamplingParams {
            temperature: self.temperature,
            top_k: self.top_k,
            top_p: self.top_p,
            min_p: self.min_p,
            repetition_penalty: self.repetition_penalty,
            max_tokens: Some(self.max_tokens),
            min_tokens: 0,
            stop: self.stop.clone(),
            stop_ids: self.stop_id.clone(),
            ignore_eos: self.ignore_eos,
            seed: self.seed,
        }
    }
}

/// Write the logits of a sequence.
///
/// The file is safetensors with one tensor, `logits`: f32, [number of ids, vocabulary]; row i
/// is what the model expects after id i. It is written beside its name and renamed when it is
/// whole. Memory does not grow with the number of ids but for the KV cache.
#[derive(Debug, Args)]
pub(crate) struct LogitsArgs {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// The sequence, as token ids
    #[arg(long, value_name = "1,2,3", allow_hyphen_values = true)]
    pub(crate) ids: Ids,
    /// The file to write
    #[arg(long, value_name = "FILE")]
    pub(crate) out: PathBuf,
    /// The most ids computed in one step
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        default_value_t = 512,
        help_heading = "Execution"
    )]
    pub(crate) max_batch_tokens: usize,
    /// Print what was written as a JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Show the slices of every rank.
///
/// A line for each tensor and rank: name, shape, rank, the slice it holds, its bytes in
/// storage. Then the check: the slices of all ranks cover each tensor of the checkpoint,
/// overlap only where a whole KV head is replicated, and those that are multiplied with each
/// other match on every rank.
#[derive(Debug, Args)]
pub(crate) struct ShardsArgs {
    /// The model directory
    #[arg(long, value_name = "DIR")]
    pub(crate) model: PathBuf,
    /// The number of ranks; where it is impossible, the error lists the possible ones
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        default_value_t = 1
    )]
    pub(crate) tp: usize,
    /// How weights are stored: decides the bytes; auto is as in the checkpoint
    #[arg(long, value_name = "TYPE", default_value = "auto")]
    pub(crate) dtype: Storage,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
}

/// Look at the CUDA devices and the links between them.
///
/// Prints the driver, the devices, what the driver says of every link, and whether it holds:
/// kernels on all devices write to each other, wait for what they write and read it back. Then
/// the order of the ring, the all-reduce for each size and why not the others, and, on real
/// devices, the bandwidth of copies. All of it happens in a process of its own, which is given
/// up after --timeout. Needs a binary built with --features cuda.
///
/// Exit codes: 0 if a group of these devices can work, 1 if not, or if it could not be found out.
#[derive(Debug, Args)]
pub(crate) struct DoctorArgs {
    /// The CUDA device of each rank, such as 0,0,1 [default: the first 8]
    #[arg(long, value_delimiter = ',', value_name = "LIST")]
    pub(crate) devices: Vec<usize>,
    /// How many seconds a kernel waits for what another device writes
    #[arg(id = "probe", long = "probe-seconds", allow_negative_numbers = true, value_name = "SECONDS", default_value = "2", value_parser = deadline)]
    pub(crate) probe: Duration,
    /// After how many seconds to give up
    #[arg(long, allow_negative_numbers = true, value_name = "SECONDS", default_value = "120", value_parser = deadline)]
    pub(crate) timeout: Duration,
    /// Print one JSON object
    #[arg(long)]
    pub(crate) json: bool,
    /// Calls the driver in this process and prints each step as it is done, as JSON
    #[arg(long, hide = true)]
    pub(crate) in_this_process: bool,
}

/// Measure a collective between ranks, for messages of several sizes.
///
/// On the CPU and on real GPUs: the time of a call (the median; on GPUs of the slowest rank), and
/// as nccl-tests has them algbw, message bytes over time, and busbw, what the busiest link
/// carries: algbw times 2(N-1)/N for all-reduce, (N-1)/N for reduce-scatter and all-gather. The
/// message of all-gather is its output. On the virtual GPU, which takes no time: what one call of
/// all ranks does, counted: bytes over the links (and what the algorithm's formula says),
/// messages that follow one another, sectors of global memory, barriers of blocks, fences, flags
/// that are written and read.
///
/// With --model: the median time of a prefill and of a step of decode, and the share of it in
/// collectives (on the CPU; devices do not say); on the virtual GPU by kernel the launches and
/// bytes of one step of all ranks, what is copied from and to the host, and the bytes over links.
/// Standard error gets each rank's memory by what it is for.
#[derive(Debug, Args)]
pub(crate) struct BenchArgs {
    /// What to measure
    #[arg(value_enum, default_value_t = Operation::AllReduce)]
    pub(crate) operation: Operation,
    /// Measure prefill and decode of the model in this directory, and no collective
    #[arg(long, value_name = "DIR", conflicts_with_all = ["operation", "sizes"])]
    pub(crate) model: Option<PathBuf>,
    /// The tokens of the prompt of a model [default: 128, or 8 where they are counted]
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        requires = "model"
    )]
    pub(crate) prompt: Option<usize>,
    /// The steps of decode that are timed [default: 32]
    #[arg(
        long,
        allow_negative_numbers = true,
        value_name = "N",
        requires = "model"
    )]
    pub(crate) steps: Option<usize>,
    /// The number of ranks [default: 2, or all devices up to 8; for a model 1]
    #[arg(long, allow_negative_numbers = true, value_name = "N")]
    pub(crate) tp: Option<usize>,
    /// Where the ranks are
    #[arg(long, value_enum, value_name = "DEVICE", default_value_t = Device::Cpu)]
    pub(crate) device: Device,
    /// The CUDA device of each rank, such as 0,0,1; sets --tp and --device
    #[arg(
        long,
        value_delimiter = ',',
        value_name = "LIST",
        conflicts_with = "tp"
    )]
    pub(crate) devices: Vec<usize>,
    /// The type of the elements, of weights and KV cache [default: f32; a model's own]
    #[arg(long, value_name = "TYPE")]
    pub(crate) dtype: Option<DType>,
    /// Bytes of the messages; K, M and G are powers of 1024
    #[arg(long, value_name = "1K,1M,..")]
    pub(crate) sizes: Option<Sizes>,
    /// One all-reduce by name [default: every one]
    #[arg(long, value_name = "NAME")]
    pub(crate) all_reduce: Option<String>,
    /// Each rank adds and normalises its part of the rows of a model's step
    #[arg(long, requires = "model")]
    pub(crate) sequence_parallel: bool,
    /// The same bits whatever else is in a model's step, on devices too
    #[arg(long, requires = "model")]
    pub(crate) batch_invariant: bool,
    /// Print one JSON object a line
    #[arg(long)]
    pub(crate) json: bool,
}

impl BenchArgs {
    /// The type of a collective's elements.
    pub(crate) fn elements(&self) -> DType {
        self.dtype.unwrap_or(DType::F32)
    }
}

/// A collective.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Operation {
    /// The sum over all ranks, on every rank
    AllReduce,
    /// A part of the sum on every rank
    ReduceScatter,
    /// The parts of all ranks, on every rank
    AllGather,
    /// The message of rank 0, on every rank
    Broadcast,
}

/// Sizes in bytes, separated by commas; at least one.
#[derive(Clone, Debug)]
pub(crate) struct Sizes(pub(crate) Vec<usize>);

impl FromStr for Sizes {
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        let parse = |size: &str| {
            let size = size.trim();
            let (digits, unit) = match size.char_indices().last() {
                Some((at, 'K' | 'k')) => (&size[..at], 1 << 10),
                Some((at, 'M' | 'm')) => (&size[..at], 1 << 20),
                Some((at, 'G' | 'g')) => (&size[..at], 1 << 30),
                _ => (size, 1),
            };
            let bytes: Option<usize> = digits.parse().ok();
            bytes.and_then(|b| b.checked_mul(unit)).ok_or_else(|| {
                format!("expected sizes with commas between, as 512,8K,1M, found {size:?}")
            })
        };
        list.split(',')
            .map(parse)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

/// A storage type, or `None` for the checkpoint's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Storage(pub(crate) Option<DType>);

impl FromStr for Storage {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "auto" => Ok(Self(None)),
            name => name
                .parse()
                .map(|dtype| Self(Some(dtype)))
                .map_err(|_| "expected auto, f32, bf16 or f16; name one of these".to_string()),
        }
    }
}

/// Token ids, separated by commas; empty for no id.
#[derive(Clone, Debug)]
pub(crate) struct Ids(pub(crate) Vec<u32>);

impl FromStr for Ids {
    type Err = String;

    fn from_str(list: &str) -> Result<Self, String> {
        let list = list.trim();
        if list.is_empty() {
            return Ok(Self(Vec::new()));
        }
        let parse = |id: &str| {
            id.trim().parse().map_err(|_| {
                format!(
                    "token ids: expected numbers from 0 to {} with commas between, found {id:?}; \
                     use ids of this model's tokenizer",
                    u32::MAX
                )
            })
        };
        list.split(',')
            .map(parse)
            .collect::<Result<_, _>>()
            .map(Self)
    }
}

fn deadline(seconds: &str) -> Result<Duration, String> {
    let parsed: Option<f64> = seconds.parse().ok();
    match parsed {
        Some(seconds) if seconds > 0.0 && seconds <= 86_400.0 => {
            Ok(Duration::from_secs_f64(seconds))
        }
        _ => Err("expected seconds above 0, at most 86400".into()),
    }
}
