//! One rank's part of the decoder.

use std::ops::Range;

use super::{Batch, Limits, Rope};
use crate::backend::{Backend, HeadCounts, KvShape, MemoryUse, StepSize};
use crate::checkpoint::{Checkpoint, LlamaConfig};
use crate::comm::{Communicator, Room};
use crate::dtype::DType;
use crate::error::Result;
use crate::host::HostMatrix;
use crate::layers::{
    Attention, AttentionState, MergedColumnParallelLinear, Mlp, OutputProjection, ParallelLmHead,
    Partition, QkvParallelLinear, Rank, RmsNorm, Stream, VocabParallelEmbedding, opaque_debug,
};
use crate::shard::{Dims, HeadShard, split};

struct DecoderLayer<B: Backend> {
    input_norm: RmsNorm<B>,
    attention: Attention<B>,
    post_attention_norm: RmsNorm<B>,
    mlp: Mlp<B>,
}

/// Activations of a step; they grow to the largest batch seen.
struct Workspace<T> {
    /// `[rows, hidden]`: the sum of all that was added so far, the same on all ranks.
    residual: T,
    /// `[rows, hidden]`: normalised.
    hidden: T,
    /// `[rows, (q + 2 kv) * head_dim]`
    qkv: T,
    /// `[rows, q * head_dim]`
    heads: T,
    /// `[rows, the rank's part of intermediate]`
    inner: T,
    /// `[rows, hidden]`: a block's output.
    output: T,
    /// `[logits rows, hidden]`
    wanted: T,
    /// `[logits rows, the rank's part of the vocabulary]`
    logits: T,
}

/// A paged KV cache of one rank, as [`Model::forward`] takes it: the caller owns it and knows
/// from its block allocator which blocks are whose.
#[derive(Debug)]
pub struct KvCache<B: Backend> {
    /// The pages; their layout is that of the backend.
    pub pages: B::KvPages,
    /// Their sizes.
    pub shape: KvShape,
}

/// How one rank's part of a model is loaded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LoadOptions {
    /// Storage type of the weights.
    pub dtype: DType,
    /// The same bits for any number of ranks, for about one and a half times the bytes between
    /// them: see [`OutputProjection::Gathered`].
    pub tp_invariant: bool,
}

/// One rank's part of a Llama.
pub struct Model<B: Backend> {
    dims: Dims,
    part: Partition,
    rope: Rope,
    max_model_len: usize,
    embedding: VocabParallelEmbedding<B>,
    layers: Vec<DecoderLayer<B>>,
    norm: RmsNorm<B>,
    head: ParallelLmHead<B>,
    workspace: Workspace<B::Tensor>,
    /// Whether output projections are gathered: see [`LoadOptions::tp_invariant`].
    gathers: bool,
    /// What steps all ranks have room for, and how many rows of whole logits.
    room: Room<5>,
    whole_rows: Room<1>,
}

impl<B: Backend> Model<B> {
    /// Loads one rank's part; `progress` is told the bytes of each weight of the checkpoint when
    /// this rank is done with it.
    ///
    /// # Errors
    /// A `tp` that is not valid for the model; memory.
    pub fn load<C: Communicator<B>>(
        rank: &mut Rank<'_, B, C>,
        checkpoint: &Checkpoint,
        options: LoadOptions,
        progress: &dyn Fn(usize),
    ) -> Result<Self> {
        let (config, part) = (checkpoint.config(), rank.partition());
        config.dims.check_tp(part.tp)?;
        let mut loader = Loader {
            backend: &mut *rank.backend,
            checkpoint,
            config,
            part,
            options,
            progress,
        };
        let embedding = loader.embedding()?;
        let layers = (0..config.dims.num_hidden_layers)
            .map(|layer| loader.layer(&format!("model.layers.{layer}")))
            .collect::<Result<_>>()?;
        let norm = loader.norm("model.norm.weight")?;
        let head = loader.head()?;
        Ok(Self {
            dims: config.dims,
            part,
            rope: Rope::new(config),
            max_model_len: config.max_context(),
            embedding,
            layers,
            norm,
            head,
            workspace: Workspace::new(rank, &config.dims)?,
            gathers: options.tp_invariant && part.tp > 1,
            room: Room::default(),
            whole_rows: Room::default(),
        })
    }

    /// The sizes of the whole model.
    pub fn dims(&self) -> &Dims {
        &self.dims
    }

    /// Lowers the context limit.
    pub fn limit_context(&mut self, max_model_len: usize) {
        self.max_model_len = self.max_model_len.min(max_model_len);
    }

    /// A KV cache for this rank's heads: `num_blocks` blocks of `block_size` positions a layer.
    pub fn kv_cache(
        &self,
        backend: &mut B,
        num_blocks: usize,
        block_size: usize,
        dtype: DType,
    ) -> Result<KvCache<B>> {
        let shape = KvShape {
            num_layers: self.layers.len(),
            num_blocks,
            block_size,
            num_kv_heads: HeadShard::new(&self.dims, self.part.tp, self.part.rank)
                .kv
                .len(),
            head_dim: self.dims.head_dim,
            dtype,
        };
        Ok(KvCache {
            pages: backend.kv_pages(shape)?,
            shape,
        })
    }

    /// What memory the rank has, with this cache.
    pub fn memory<C: Communicator<B>>(&self, rank: &Rank<'_, B, C>, kv: &KvCache<B>) -> MemoryUse {
        MemoryUse {
            communicator: rank.comm.memory(),
            ..rank.backend.memory(&self.workspace.tensors(), &kv.pages)
        }
    }

    /// What a batch must keep to with this cache.
    pub fn limits(&self, kv: &KvCache<B>) -> Limits {
        Limits {
            vocab_size: self.dims.vocab_size,
            max_model_len: self.max_model_len,
            num_blocks: kv.shape.num_blocks,
            block_size: kv.shape.block_size,
        }
    }

    /// Runs `batch`, appending its entries to `kv`. Returns the logits of the rows asked for
    /// over this rank's part of the vocabulary, `[logits_rows, ids of the shard]`, and the head
    /// that knows that part: for [`super::select`]. All of them: [`Self::gather_logits`].
    ///
    /// All ranks of the group call this with the same batch.
    ///
    /// # Errors
    /// A batch that breaks the limits, before anything is done; a communication failure.
    pub fn forward<C: Communicator<B>>(
        &mut self,
        rank: &mut Rank<'_, B, C>,
        batch: &Batch,
        kv: &mut KvCache<B>,
    ) -> Result<(&B::Tensor, &ParallelLmHead<B>)> {
        batch.check(&self.limits(kv))?;
        let tables = self.rope.tables(batch);
        self.make_room(rank, batch)?;
        let plan = rank.backend.plan(batch, tables, kv.shape.block_size)?;
        let ws = &mut self.workspace;
        ws.set_rows(rank.backend, batch.rows(), batch.logits_rows.len())?;

        self.embedding.forward(rank, &plan, &mut ws.residual)?;
        // Every block ends in the norm that the next one starts with, so that sum, residual
        // and norm are one operation.
        let next_norms = self
            .layers
            .iter()
            .skip(1)
            .map(|l| &l.input_norm)
            .chain([&self.norm]);
        let first_norm = self.layers.first().map_or(&self.norm, |l| &l.input_norm);
        first_norm.forward(rank.backend, &ws.residual, &mut ws.hidden)?;
        let mut stream = Stream {
            rows: batch.rows(),
            residual: &mut ws.residual,
            hidden: &mut ws.hidden,
            output: &mut ws.output,
        };
        for (index, (layer, next_norm)) in self.layers.iter().zip(next_norms).enumerate() {
            let state = AttentionState {
                plan: &plan,
                pages: &mut kv.pages,
                layer: index,
                qkv: &mut ws.qkv,
                heads: &mut ws.heads,
            };
            let norm = &layer.post_attention_norm;
            layer.attention.forward(rank, &mut stream, norm, state)?;
            layer
                .mlp
                .forward(rank, &mut stream, next_norm, &mut ws.inner)?;
        }
        rank.backend
            .logits_rows(&ws.hidden, &plan, &mut ws.wanted)?;
        self.head
            .forward(rank.backend, &self.embedding, &ws.wanted, &mut ws.logits)?;
        Ok((&ws.logits, &self.head))
    }

    /// Takes what memory the step of `batch` needs beyond that of all before, before its first
    /// collective: see [`Room`].
    fn make_room<C: Communicator<B>>(
        &mut self,
        rank: &mut Rank<'_, B, C>,
        batch: &Batch,
    ) -> Result<()> {
        let StepSize {
            rows,
            logits_rows,
            sequences,
            blocks,
            context,
        } = StepSize::of(batch).rounded_up();
        let heads = HeadShard::new(&self.dims, self.part.tp, self.part.rank);
        let heads = HeadCounts {
            q: heads.q.len(),
            kv: heads.kv.len(),
            head_dim: self.dims.head_dim,
        };
        let Dims {
            hidden_size,
            intermediate_size,
            num_attention_heads,
            head_dim,
            ..
        } = self.dims;
        let columns = match self.gathers {
            // A whole input of a projection, and this rank's columns of its output.
            true => vec![
                (num_attention_heads * head_dim).max(intermediate_size),
                self.part.of(hidden_size).len(),
            ],
            false => rank.comm.passing_columns(hidden_size),
        };
        let workspace = &mut self.workspace;
        let (comm, backend) = (&mut *rank.comm, &mut *rank.backend);
        let wanted = [rows, logits_rows, sequences, blocks, context];
        self.room.make(comm, backend, wanted, |backend, sizes| {
            let [rows, logits_rows, sequences, blocks, context] = sizes;
            let size = StepSize {
                rows,
                logits_rows,
                sequences,
                blocks,
                context,
            };
            workspace.set_rows(backend, rows, logits_rows)?;
            backend.reserve(&size, heads, &columns)
        })
    }

    /// All ranks' logits of the last [`Self::forward`]: `[logits_rows, vocab]`, row-major.
    pub fn gather_logits<C: Communicator<B>>(
        &mut self,
        rank: &mut Rank<'_, B, C>,
        rows: usize,
    ) -> Result<Vec<f32>> {
        let vocab = self.dims.vocab_size;
        let (comm, backend) = (&mut *rank.comm, &mut *rank.backend);
        // The room is what is left of them.
        self.whole_rows
            .make(comm, backend, [rows], |backend, [rows]| {
                backend.logits(rows, vocab).map(drop)
            })?;
        let mut all = rank.backend.logits(rows, vocab)?;
        self.head.gather(rank, &self.workspace.logits, &mut all)?;
        rank.backend.read(&all)
    }
}

impl<T> Workspace<T> {
    fn new<B: Backend<Tensor = T>, C: Communicator<B>>(
        rank: &mut Rank<'_, B, C>,
        dims: &Dims,
    ) -> Result<Self> {
        let part = rank.partition();
        // These are reduced over the ranks.
        let residual = rank.comm.buffer(rank.backend, 0, dims.hidden_size)?;
        let output = rank.comm.buffer(rank.backend, 0, dims.hidden_size)?;
        let backend = &mut *rank.backend;
        let heads = HeadShard::new(dims, part.tp, part.rank);
        let (q, kv) = (
            heads.q.len() * dims.head_dim,
            heads.kv.len() * dims.head_dim,
        );
        let vocab = crate::shard::VocabShard::new(dims.vocab_size, part.tp, part.rank);
        Ok(Self {
            residual,
            hidden: backend.tensor(0, dims.hidden_size)?,
            qkv: backend.tensor(0, q + 2 * kv)?,
            heads: backend.tensor(0, q)?,
            inner: backend.tensor(0, part.of(dims.intermediate_size).len())?,
            output,
            wanted: backend.tensor(0, dims.hidden_size)?,
            logits: backend.logits(0, vocab.ids.len())?,
        })
    }

    fn tensors(&self) -> [&T; 8] {
        let Self {
            residual,
            hidden,
            qkv,
            heads,
            inner,
            output,
            wanted,
            logits,
        } = self;
        [residual, hidden, qkv, heads, inner, output, wanted, logits]
    }

    fn set_rows<B: Backend<Tensor = T>>(
        &mut self,
        backend: &mut B,
        rows: usize,
        logits_rows: usize,
    ) -> Result<()> {
        for tensor in [
            &mut self.residual,
            &mut self.hidden,
            &mut self.qkv,
            &mut self.heads,
            &mut self.inner,
            &mut self.output,
        ] {
            backend.set_rows(tensor, rows)?;
        }
        backend.set_rows(&mut self.wanted, logits_rows)?;
        backend.set_rows(&mut self.logits, logits_rows)
    }
}

/// Makes the layers of one rank from a checkpoint.
struct Loader<'a, B> {
    backend: &'a mut B,
    checkpoint: &'a Checkpoint,
    config: &'a LlamaConfig,
    part: Partition,
    options: LoadOptions,
    progress: &'a dyn Fn(usize),
}

impl<'a, B: Backend> Loader<'a, B> {
    fn tensor(&self, name: &str) -> Result<HostMatrix<'a>> {
        let tensor = self.checkpoint.tensor(name)?;
        (self.progress)(tensor.rows() * tensor.cols() * tensor.dtype().size());
        Ok(tensor)
    }

    fn weight(&self, layer: &str) -> Result<HostMatrix<'a>> {
        self.tensor(&format!("{layer}.weight"))
    }

    fn bias(&self, layer: &str, present: bool) -> Result<Option<HostMatrix<'a>>> {
        present
            .then(|| self.tensor(&format!("{layer}.bias")))
            .transpose()
    }

    /// The same of several projections: all have a bias, or none.
    fn projections<const N: usize>(
        &self,
        names: [String; N],
        bias: bool,
    ) -> Result<([HostMatrix<'a>; N], Option<[HostMatrix<'a>; N]>)> {
        let collect = |suffix: &str| -> Result<[HostMatrix<'a>; N]> {
            let list: Vec<_> = names
                .iter()
                .map(|name| self.tensor(&format!("{name}.{suffix}")))
                .collect::<Result<_>>()?;
            Ok(std::array::from_fn(|i| list[i]))
        };
        Ok((
            collect("weight")?,
            bias.then(|| collect("bias")).transpose()?,
        ))
    }

    fn norm(&mut self, name: &str) -> Result<RmsNorm<B>> {
        let weight = self.tensor(name)?;
        RmsNorm::new(self.backend, weight, self.config.rms_norm_eps)
    }

    fn embedding(&mut self) -> Result<VocabParallelEmbedding<B>> {
        let table = self.tensor("model.embed_tokens.weight")?;
        VocabParallelEmbedding::new(self.backend, table, self.part, self.options.dtype)
    }

    fn head(&mut self) -> Result<ParallelLmHead<B>> {
        if self.config.dims.tie_word_embeddings {
            return Ok(ParallelLmHead::tied(self.config.dims.vocab_size, self.part));
        }
        let weight = self.tensor("lm_head.weight")?;
        ParallelLmHead::new(self.backend, weight, self.part, self.options.dtype)
    }

    /// An output projection; `range` says which part of its input a rank has.
    fn output(
        &mut self,
        layer: &str,
        bias: bool,
        range: impl Fn(usize) -> Range<usize>,
    ) -> Result<OutputProjection<B>> {
        let (weight, bias) = (self.weight(layer)?, self.bias(layer, bias)?);
        let ranges: Vec<_> = (0..self.part.tp).map(range).collect();
        let LoadOptions {
            dtype,
            tp_invariant,
        } = self.options;
        let part = self.part;
        OutputProjection::new(
            self.backend,
            weight,
            bias,
            part,
            &ranges,
            dtype,
            tp_invariant,
        )
    }

    fn layer(&mut self, layer: &str) -> Result<DecoderLayer<B>> {
        let (dims, part) = (self.config.dims, self.part);
        let input_norm = self.norm(&format!("{layer}.input_layernorm.weight"))?;
        let (weights, bias) = self.projections(
            ["q_proj", "k_proj", "v_proj"].map(|name| format!("{layer}.self_attn.{name}")),
            dims.attention_bias,
        )?;
        let qkv =
            QkvParallelLinear::new(self.backend, &dims, weights, bias, part, self.options.dtype)?;
        let o = self.output(
            &format!("{layer}.self_attn.o_proj"),
            dims.attention_bias,
            |rank| {
                let heads = HeadShard::new(&dims, part.tp, rank).q;
                heads.start * dims.head_dim..heads.end * dims.head_dim
            },
        )?;
        let post_attention_norm = self.norm(&format!("{layer}.post_attention_layernorm.weight"))?;
        let (weights, bias) = self.projections(
            ["gate_proj", "up_proj"].map(|name| format!("{layer}.mlp.{name}")),
            dims.mlp_bias,
        )?;
        let gate_up =
            MergedColumnParallelLinear::new(self.backend, weights, bias, part, self.options.dtype)?;
        let down = self.output(&format!("{layer}.mlp.down_proj"), dims.mlp_bias, |rank| {
            split(dims.intermediate_size, part.tp, rank)
        })?;
        Ok(DecoderLayer {
            input_norm,
            attention: Attention { qkv, o },
            post_attention_norm,
            mlp: Mlp { gate_up, down },
        })
    }
}

opaque_debug!(Model);
