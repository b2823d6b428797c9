//! A loaded model with its tokenizer.

use std::ops::ControlFlow;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use super::chat::ChatTemplate;
use super::output::{Completion, Event, Timing};
use super::params::SamplingParams;
use super::prompt::Prompt;
use super::run::{Request, run};
use super::scheduler::check_prompt;
use super::tokenizer::Tokenizer;
use crate::backend::MemoryUse;
use crate::checkpoint::Checkpoint;
use crate::dtype::DType;
use crate::error::{Error, Result};
use crate::llama::{Group, GroupOptions, Limits, Progress, StepHook};
use crate::shard::{ShardPlan, TensorPlan};

/// How a model is loaded; [`Llm::builder`] begins one.
#[derive(Clone)]
pub struct LlmBuilder {
    dir: PathBuf,
    max_batch_tokens: usize,
    group: GroupOptions,
}

impl LlmBuilder {
    /// The number of ranks, 1 by default. Not every number is possible for every model; the
    /// error lists those that are.
    pub fn tp(mut self, tp: usize) -> Self {
        self.group.tp = tp;
        self
    }

    /// The storage type of weights and KV cache; by default the checkpoint's.
    pub fn dtype(mut self, dtype: impl Into<Option<DType>>) -> Self {
        self.group.dtype = dtype.into();
        self
    }

    /// The CUDA device of each rank (one may have several), for a build with the feature `cuda`;
    /// by default ranks are threads on the CPU.
    pub fn devices(mut self, devices: impl Into<Option<Vec<usize>>>) -> Self {
        self.group.devices = devices.into();
        self
    }

    /// The threads of all ranks together; by default one a core.
    pub fn threads(mut self, threads: impl Into<Option<usize>>) -> Self {
        self.group.threads = threads.into();
        self
    }

    /// A context shorter than the model's, in tokens.
    pub fn max_model_len(mut self, tokens: impl Into<Option<usize>>) -> Self {
        self.group.max_model_len = tokens.into();
        self
    }

    /// The blocks of the KV cache; by default as the group chooses.
    pub fn num_blocks(mut self, blocks: impl Into<Option<usize>>) -> Self {
        self.group.num_blocks = blocks.into();
        self
    }

    /// Each rank adds and normalises its part of the rows of a step; the same bytes, and the bits of
    /// sums in rank order.
    pub fn sequence_parallel(mut self, sequence_parallel: bool) -> Self {
        self.group.sequence_parallel = sequence_parallel;
        self
    }

    /// The bits of a row do not depend on its batch on devices either, for slower steps of few rows.
    /// Off by default; on the CPU it changes nothing, but that the ring is refused as it is there.
    pub fn batch_invariant(mut self, batch_invariant: bool) -> Self {
        self.group.batch_invariant = batch_invariant;
        self
    }

    /// The same bits for any number of ranks, for about one and a half times the bytes between
    /// them. Off by default: then another `tp` rounds differently.
    pub fn tp_invariant(mut self, tp_invariant: bool) -> Self {
        self.group.tp_invariant = tp_invariant;
        self
    }

    /// The all-reduce, by name; by default chosen by size.
    pub fn all_reduce(mut self, name: impl Into<Option<String>>) -> Self {
        self.group.all_reduce = name.into();
        self
    }

    /// How long a rank waits for another before the group is given up.
    pub fn deadline(mut self, deadline: Duration) -> Self {
        self.group.deadline = deadline;
        self
    }

    /// The most rows of a step, 512 by default: longer prompts are computed in chunks.
    pub fn max_batch_tokens(mut self, rows: usize) -> Self {
        self.max_batch_tokens = rows;
        self
    }

    /// Who is told of the bytes of each weight as a rank is done with it: in all, as often as
    /// there are ranks, [`OpenModel::weight_bytes`].
    pub fn progress(mut self, progress: impl Into<Option<Progress>>) -> Self {
        self.group.progress = progress.into();
        self
    }

    /// Who is told, on each rank's thread, of every step: for tracing, and for tests that make
    /// a rank fail.
    pub fn on_step(mut self, hook: impl Into<Option<StepHook>>) -> Self {
        self.group.on_step = hook.into();
        self
    }

    /// Reads and checks everything but the weights.
    pub fn open(self) -> Result<OpenModel> {
        let checkpoint = Arc::new(Checkpoint::open(&self.dir)?);
        let config = checkpoint.config();
        config.dims.check_tp(self.group.tp)?;
        for (what, value) in [
            ("max_batch_tokens", Some(self.max_batch_tokens)),
            ("num_blocks", self.group.num_blocks),
        ] {
            if value == Some(0) {
                return Err(Error::input(
                    what,
                    "at least 1",
                    0,
                    "raise it or leave it out",
                ));
            }
        }
        let max_model_len = context(config.max_context(), self.group.max_model_len)?;
        Ok(OpenModel {
            checkpoint,
            max_model_len,
            max_batch_tokens: self.max_batch_tokens,
            group: self.group,
            tokenizer: OnceLock::new(),
            chat: OnceLock::new(),
        })
    }

    /// Loads the model.
    pub fn build(self) -> Result<Llm> {
        self.open()?.load()
    }
}

/// `limit`, the positions of the model, or fewer if `asked` says so.
fn context(limit: usize, asked: Option<usize>) -> Result<usize> {
    match asked {
        None => Ok(limit),
        Some(asked) if (1..=limit).contains(&asked) => Ok(asked),
        Some(asked) => Err(Error::input(
            "max_model_len",
            format_args!("1 to {limit}, the positions of this model"),
            asked,
            "choose one of these or leave it out",
        )),
    }
}

/// A model directory with everything read but the weights: prompts can be checked and encoded.
///
/// Tokenizer and chat template are read when they are first needed, so that a model without
/// them serves prompts of ids.
pub struct OpenModel {
    checkpoint: Arc<Checkpoint>,
    max_model_len: usize,
    max_batch_tokens: usize,
    group: GroupOptions,
    tokenizer: OnceLock<Result<Tokenizer>>,
    chat: OnceLock<Result<ChatTemplate>>,
}

impl OpenModel {
    /// The checkpoint.
    pub fn checkpoint(&self) -> &Checkpoint {
        &self.checkpoint
    }

    /// The context, in tokens.
    pub fn max_model_len(&self) -> usize {
        self.max_model_len
    }

    /// The bytes of the model's weights as the checkpoint has them.
    pub fn weight_bytes(&self) -> Result<usize> {
        let plan = ShardPlan::new(&self.checkpoint.config().dims, 1)?;
        let bytes = |plan: &TensorPlan| {
            let tensor = self.checkpoint.tensor(&plan.name)?;
            Ok(plan.elements(0) * tensor.dtype().size())
        };
        plan.tensors().iter().map(bytes).sum()
    }

    /// The tokenizer, or why there is none.
    pub fn tokenizer(&self) -> Result<&Tokenizer> {
        let tokenizer = self
            .tokenizer
            .get_or_init(|| Tokenizer::open(self.checkpoint.dir()));
        tokenizer.as_ref().map_err(Error::clone)
    }

    /// The chat template, or why there is none.
    pub fn chat_template(&self) -> Result<&ChatTemplate> {
        let chat = self
            .chat
            .get_or_init(|| ChatTemplate::open(self.checkpoint.dir()));
        chat.as_ref().map_err(Error::clone)
    }

    /// The ids of a prompt; special tokens are added to a text, and not to a chat, whose
    /// template has them, nor to ids.
    pub fn encode(&self, prompt: &Prompt) -> Result<Vec<u32>> {
        match prompt {
            Prompt::Text(text) => self.tokenizer()?.encode(text),
            Prompt::Ids(ids) => Ok(ids.clone()),
            Prompt::Chat(messages) => {
                let text = self.chat_template()?.render(messages, true)?;
                self.tokenizer()?.encode_rendered(&text)
            }
        }
    }

    /// Prompts as requests to the engine: encoded, checked, with the model's defaults.
    pub fn requests(&self, prompts: &[(Prompt, SamplingParams)]) -> Result<Vec<Request<'_>>> {
        let config = self.checkpoint.config();
        let request = |(index, (prompt, params)): (usize, &(Prompt, SamplingParams))| {
            let empty = match prompt {
                Prompt::Text(text) => text.is_empty(),
                Prompt::Ids(ids) => ids.is_empty(),
                Prompt::Chat(messages) => messages.is_empty(),
            };
            // A tokenizer would make an empty text one special token.
            let ids = if empty {
                Vec::new()
            } else {
                self.encode(prompt)?
            };
            check_prompt(config.dims.vocab_size, self.max_model_len, index, &ids)?;
            Ok(Request {
                prompt: ids,
                sampling: params
                    .resolve(self.checkpoint.generation_config(), &config.eos_token_ids)?,
                tokenizer: match prompt {
                    Prompt::Ids(_) => None,
                    _ => Some(self.tokenizer()?),
                },
            })
        };
        prompts.iter().enumerate().map(request).collect()
    }

    /// Loads the weights and starts the ranks.
    pub fn load(self) -> Result<Llm> {
        let options = GroupOptions {
            max_model_len: Some(self.max_model_len),
            ..self.group.clone()
        };
        let group = Group::load(self.checkpoint.clone(), options)?;
        Ok(Llm {
            model: self,
            group,
            timing: Timing::default(),
        })
    }
}

/// A Llama on its ranks: prompts in, completions out.
///
/// ```no_run
/// use ringtp::generate::{Llm, SamplingParams};
///
/// let mut llm = Llm::builder("path/to/model").tp(4).build()?;
/// let params = SamplingParams::default().temperature(0.7).max_tokens(64).seed(1);
/// for completion in llm.generate(&["It is a truth", "My dear"], &params)? {
///     println!("{:?} ({})", completion.text, completion.finish_reason);
/// }
/// # Ok::<(), ringtp::Error>(())
/// ```
pub struct Llm {
    model: OpenModel,
    group: Group,
    timing: Timing,
}

impl Llm {
    /// A builder for the model in directory `dir`: config.json, weights as safetensors and,
    /// for prompts of text, tokenizer.json.
    pub fn builder(dir: impl AsRef<Path>) -> LlmBuilder {
        LlmBuilder {
            dir: dir.as_ref().to_path_buf(),
            max_batch_tokens: 512,
            group: GroupOptions::default(),
        }
    }

    /// The directory's side of the model: configuration, tokenizer, chat template.
    pub fn model(&self) -> &OpenModel {
        &self.model
    }

    /// What a batch must keep to.
    pub fn limits(&self) -> Limits {
        self.group.limits()
    }

    /// What memory each rank has, as of its last answer.
    pub fn memory(&self) -> &[MemoryUse] {
        self.group.memory()
    }

    /// The CUDA device of each rank, where they are on devices.
    pub fn devices(&self) -> Option<&[usize]> {
        self.group.devices()
    }

    /// The ranks, to drive by hand.
    pub fn group(&mut self) -> &mut Group {
        &mut self.group
    }

    /// How long the last generation took.
    pub fn timing(&self) -> Timing {
        self.timing
    }

    /// Completes each of `prompts`.
    ///
    /// Bad input (an empty prompt, ids outside the vocabulary, a prompt longer than the
    /// context, parameters out of range) is an error before any work, which names the prompt
    /// by its index; so does one of logits that no token can be chosen from, which calls it a
    /// row. If a rank fails, the error says which and why; [`rebuild`](Self::rebuild)
    /// makes the model usable again.
    pub fn generate<P: Into<Prompt> + Clone>(
        &mut self,
        prompts: &[P],
        params: &SamplingParams,
    ) -> Result<Vec<Completion>> {
        self.generate_with(prompts, params, |_| ControlFlow::Continue(()))
    }

    /// [`generate`](Self::generate) that tells `on_event` of each token as it comes. A `Break`
    /// on a token ends its request.
    pub fn generate_with<P: Into<Prompt> + Clone>(
        &mut self,
        prompts: &[P],
        params: &SamplingParams,
        on_event: impl FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Completion>> {
        let requests: Vec<_> = prompts
            .iter()
            .map(|prompt| (prompt.clone().into(), params.clone()))
            .collect();
        self.generate_each(&requests, on_event)
    }

    /// [`generate_with`](Self::generate_with) where each prompt has its own parameters.
    pub fn generate_each(
        &mut self,
        prompts: &[(Prompt, SamplingParams)],
        mut on_event: impl FnMut(Event<'_>) -> ControlFlow<()>,
    ) -> Result<Vec<Completion>> {
        let requests = self.model.requests(prompts)?;
        let before = self.group.stats().comm_time;
        let max_rows = self.model.max_batch_tokens;
        let (completions, mut timing) = run(&mut self.group, max_rows, &requests, &mut on_event)?;
        timing.collectives = self.group.stats().comm_time.saturating_sub(before);
        self.timing = timing;
        Ok(completions)
    }

    /// Makes the ranks anew after one failed. The weights are kept where they can be.
    pub fn rebuild(&mut self) -> Result<()> {
        self.group.rebuild()
    }
}
