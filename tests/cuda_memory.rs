//! Memory on devices: what ranks say they have is what the driver gave; steps take more of it only
//! while no rank waits for another; and a device that is full in the middle is an error of all ranks,
//! after which a group that is rebuilt answers.
#![cfg(feature = "cuda")]

mod model_support;
mod p2p_support;

use std::time::Duration;

use model_support::{Result, batch, bits, load, open, some_ids};
use ringtp::backend::cuda::{
    BUFFER_ALIGN, Context, CudaBackend, CudaKvPages, CudaTensor, CudaVector, DevicePool,
};
use ringtp::backend::{KvShape, WantedRecord};
use ringtp::checkpoint::Checkpoint;
use ringtp::comm::p2p::{P2pComm, P2pGroup, P2pOptions};
use ringtp::comm::{CommError, Communicator};
use ringtp::layers::Rank;
use ringtp::llama::{Batch, Group, GroupOptions, KvCache, LoadOptions, Model, SampleRow, select};
use ringtp::shard::{HeadShard, ShardPlan, TensorPlan, VocabShard};
use ringtp::{DType, Error};

test_driver::also_on_a_real_driver!();

const MODEL: &str = "gqa_8_2";
const VOCAB: usize = 97;

/// Small slabs, so that small batches need another.
const SLAB: usize = 16 << 10;

/// Rows that one slab does not hold.
const LARGE: usize = 100;

/// A rank of an engine with threads of its own.
struct Engine<'a, C> {
    comm: &'a mut C,
    backend: CudaBackend,
    model: Model<CudaBackend>,
    kv: KvCache<CudaBackend>,
    blocks: Vec<u32>,
}

/// A backend for one rank.
fn backend(comm: &P2pComm) -> CudaBackend {
    let stream = comm.stream().clone();
    let pool = DevicePool::new(stream.context(), SLAB);
    CudaBackend::with(stream, pool, comm.kernels(), DType::F32).expect("a backend")
}

impl<'a, C: Communicator<CudaBackend>> Engine<'a, C> {
    fn new(
        comm: &'a mut C,
        mut backend: CudaBackend,
        checkpoint: &Checkpoint,
        tp_invariant: bool,
    ) -> Self {
        let options = LoadOptions {
            dtype: DType::F32,
            tp_invariant,
        };
        let mut rank = Rank {
            backend: &mut backend,
            comm,
        };
        let model = Model::load(&mut rank, checkpoint, options, &|_| {}).expect("a model");
        let kv = model.kv_cache(&mut backend, 16, 16, DType::F32);
        let kv = kv.expect("a cache");
        Self {
            comm,
            backend,
            model,
            kv,
            blocks: (0..16).rev().collect(),
        }
    }

    /// The logits of a prompt of so many ids, and the choice after each.
    fn prompt(&mut self, rows: usize) -> ringtp::Result<(Vec<u32>, Vec<u32>)> {
        let batch = batch(&some_ids(VOCAB, 1, rows), 0, rows, &self.blocks);
        let mut rank = Rank {
            backend: &mut self.backend,
            comm: self.comm,
        };
        let (logits, head) = self.model.forward(&mut rank, &batch, &mut self.kv)?;
        // Ids that have copies of logits made, and lists of candidates.
        let sample = SampleRow {
            temperature: 0.7,
            top_k: 3,
            repetition_penalty: 1.1,
            penalized: vec![3, 5, 90],
            seed: 1,
            ..SampleRow::greedy()
        };
        let tokens = select(&mut rank, head, logits, &vec![sample; rows])?;
        Ok((bits(&self.model.gather_logits(&mut rank, rows)?), tokens))
    }

    fn meet(&mut self) -> ringtp::Result<()> {
        self.comm.meet(&mut self.backend)
    }
}

/// Bytes of the driver that a backend's pools for steps have.
fn taken(backend: &CudaBackend) -> usize {
    backend.pool().usage().0 + backend.passing().usage().0
}

/// A rank that takes no memory while it shares out rows, and that need not meet others before it does.
struct Watched<'a> {
    comm: &'a mut P2pComm,
    meets: bool,
}

impl Communicator<CudaBackend> for Watched<'_> {
    fn rank(&self) -> usize {
        self.comm.rank()
    }

    fn world_size(&self) -> usize {
        self.comm.world_size()
    }

    fn all_reduce(&mut self, backend: &mut CudaBackend, x: &mut CudaTensor) -> ringtp::Result<()> {
        Communicator::all_reduce(self.comm, backend, x)
    }

    fn all_reduce_add_rms_norm(
        &mut self,
        backend: &mut CudaBackend,
        x: &mut CudaTensor,
        bias: Option<&CudaVector>,
        residual: &mut CudaTensor,
        weight: &CudaVector,
        eps: f32,
        out: &mut CudaTensor,
    ) -> ringtp::Result<()> {
        let before = taken(backend);
        let comm = &mut *self.comm;
        comm.all_reduce_add_rms_norm(backend, x, bias, residual, weight, eps, out)?;
        assert_eq!(taken(backend), before, "in the middle of a step");
        Ok(())
    }

    fn passing_columns(&self, cols: usize) -> Vec<usize> {
        self.comm.passing_columns(cols)
    }

    fn all_gather_columns(
        &mut self,
        backend: &mut CudaBackend,
        x: &CudaTensor,
        widths: &[usize],
        out: &mut CudaTensor,
    ) -> ringtp::Result<()> {
        Communicator::all_gather_columns(self.comm, backend, x, widths, out)
    }

    fn all_gather_words(
        &mut self,
        backend: &mut CudaBackend,
        words: &[u32],
    ) -> ringtp::Result<Vec<u32>> {
        self.comm.all_gather_words(backend, words)
    }

    fn gather_records(
        &mut self,
        backend: &mut CudaBackend,
        logits: &CudaTensor,
        shard: &VocabShard,
        wanted: &[WantedRecord<'_>],
    ) -> ringtp::Result<Vec<u32>> {
        self.comm.gather_records(backend, logits, shard, wanted)
    }

    fn meet(&mut self, backend: &mut CudaBackend) -> ringtp::Result<()> {
        match self.meets {
            true => Communicator::meet(self.comm, backend),
            false => Ok(()),
        }
    }

    fn abort(&mut self, cause: &str) {
        self.comm.abort(cause);
    }
}

/// Rank 1 is late for every step, so that collectives of rank 0 wait for it while it takes memory,
/// if they are there already.
#[test]
fn steps_take_memory_only_while_nobody_waits_and_once() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    let checkpoint = open(MODEL)?;
    for (devices, tp_invariant, sequence_parallel) in [
        ([0, 1], false, false),
        ([0, 1], true, false),
        ([0, 0], false, false),
        ([0, 0], false, true),
    ] {
        let options = P2pOptions {
            sequence_parallel,
            ..p2p_support::options()
        };
        let (_group, comms) = P2pGroup::new(&devices, options)?;
        let runs = p2p_support::run(comms, |rank| {
            let late = rank.comm.rank() == 1;
            let backend = backend(&rank.comm);
            let mut watched = Watched {
                comm: &mut rank.comm,
                meets: true,
            };
            let mut engine = Engine::new(&mut watched, backend, &checkpoint, tp_invariant);
            let mut all = vec![taken(&engine.backend)];
            let mut answers = Vec::new();
            for rows in [3, LARGE, LARGE, 3] {
                if late {
                    std::thread::sleep(Duration::from_millis(50));
                }
                answers.push(engine.prompt(rows).expect("a step"));
                all.push(taken(&engine.backend));
            }
            assert!(all[0] < all[2], "more rows take more memory: {all:?}");
            assert!(
                all[2..].iter().all(|&bytes| bytes == all[2]),
                "and no more of it the second time: {all:?}"
            );
            answers
        });
        assert_eq!(runs[0], runs[1], "{devices:?}");
        let answers = &runs[0];
        assert!(answers[1] == answers[2] && answers[0] == answers[3]);
    }
    Ok(())
}

/// The control: without the meetings the late rank waits for a device on which a collective waits for
/// the late rank, until the deadline.
#[test]
fn without_the_meetings_a_late_rank_is_waited_for_in_vain() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    if !test_driver::is_virtual() {
        test_driver::skipped("what a real driver waits for is its own business");
        return Ok(());
    }
    let checkpoint = open(MODEL)?;
    let (_group, comms) = P2pGroup::new(&[0, 0], p2p_support::impatient())?;
    let errors = p2p_support::run(comms, |rank| {
        let late = rank.comm.rank() == 1;
        let backend = backend(&rank.comm);
        let mut unmet = Watched {
            comm: &mut rank.comm,
            meets: false,
        };
        let mut engine = Engine::new(&mut unmet, backend, &checkpoint, false);
        if late {
            std::thread::sleep(Duration::from_millis(300));
        }
        engine.prompt(LARGE).err()
    });
    assert!(errors.iter().any(Option::is_some), "{errors:?}");
    Ok(())
}

/// What a group says it has of a device's memory is what the driver says is gone, before steps and
/// after them, also where ranks share a device.
#[test]
fn memory_by_kind_adds_up_to_what_the_driver_gave() -> Result {
    let Some(_driver) = test_driver::take() else {
        return Ok(());
    };
    if !test_driver::is_virtual() {
        test_driver::skipped("a real driver rounds, and loads kernels into the same memory");
        return Ok(());
    }
    let devices = [0, 0, 1];
    let checkpoint = open("mha")?;
    let free = || -> Result<[usize; 2]> {
        Ok([Context::new(0)?.memory()?.0, Context::new(1)?.memory()?.0])
    };
    let before = free()?;
    let (dtype, block_size, num_blocks) = (DType::Bf16, 16, 40);
    let mut group = Group::load(
        checkpoint.clone(),
        GroupOptions {
            tp: devices.len(),
            devices: Some(devices.to_vec()),
            dtype: Some(dtype),
            num_blocks: Some(num_blocks),
            ..Default::default()
        },
    )?;
    let dims = checkpoint.config().dims;
    let plan = ShardPlan::new(&dims, devices.len())?;
    for rows in [0, 5, 60] {
        if rows > 0 {
            group.forward(&batch(
                &some_ids(dims.vocab_size, 1, rows),
                0,
                rows,
                &[3, 1, 0, 2],
            ))?;
        }
        let after = free()?;
        for device in [0, 1] {
            let ranks = (0..devices.len()).filter(|&rank| devices[rank] == device);
            let total: usize = ranks.map(|rank| group.memory()[rank].total()).sum();
            assert_eq!(total, before[device] - after[device], "device {device}");
        }
    }
    for (rank, memory) in group.memory().iter().enumerate() {
        let shape = KvShape {
            num_layers: dims.num_hidden_layers,
            num_blocks,
            block_size,
            num_kv_heads: HeadShard::new(&dims, devices.len(), rank).kv.len(),
            head_dim: dims.head_dim,
            dtype,
        };
        let bytes = CudaKvPages::bytes_of(&shape).ok_or("a size")?;
        assert_eq!(
            memory.kv_cache,
            bytes.next_multiple_of(BUFFER_ALIGN),
            "rank {rank}"
        );
        // Matrices in bf16 and vectors in f32; each tensor may be rounded up, and each row of it.
        let needed = |tensor: &TensorPlan| {
            let size = if tensor.shape.len() == 1 { 4 } else { 2 };
            tensor.elements(rank) * size
        };
        let padding = |tensor: &TensorPlan| BUFFER_ALIGN + 16 * tensor.shape[0];
        let least: usize = plan.tensors().iter().map(needed).sum();
        let most = least + plan.tensors().iter().map(padding).sum::<usize>();
        assert!(
            (least..=most).contains(&memory.weights),
            "rank {rank}: {} for {least} to {most}",
            memory.weights
        );
    }
    drop(group);
    assert_eq!(free()?, before, "all of it comes back");
    Ok(())
}

/// What an error must say of device 1, which has no room for the activations of a step.
const ARITHMETIC: [&str; 5] = [
    "activations on CUDA device 1",
    "] of f32",
    "bytes in one piece",
    "bytes free of",
    "use smaller sizes",
];

/// Takes what is free on a device, but for so many bytes.
fn fill(device: usize, but: usize) -> ringtp::backend::cuda::DeviceBuffer {
    let context = Context::new(device).expect("the device");
    let (free, _) = context.memory().expect("it says");
    let pool = DevicePool::new(&context, 0);
    pool.buffer(free - but).expect("that much is free")
}

/// Device 1 is full when a larger batch comes: every rank has an error that names it and says what
/// did not fit, at once, and the group that is rebuilt answers as before.
#[test]
fn a_device_that_is_full_in_the_middle_is_an_error_of_all_ranks() {
    if !test_driver::is_virtual() {
        test_driver::skipped("takes all memory of a device");
        return;
    }
    let this = "a_device_that_is_full_in_the_middle_is_an_error_of_all_ranks";
    test_driver::in_a_child_with(this, &[("VGPU_MEMORY", "100000000")], || {
        let _driver = test_driver::take().expect("a driver");
        let checkpoint = open(MODEL).expect("a checkpoint");
        let (_group, comms) = p2p_support::group(2, p2p_support::options());
        let large = p2p_support::run(comms, |rank| {
            let me = rank.comm.rank();
            let backend = backend(&rank.comm);
            let mut engine = Engine::new(&mut rank.comm, backend, &checkpoint, false);
            let before = engine.prompt(5).expect("a step");
            engine.meet().expect("all");
            let hog = (me == 1).then(|| fill(1, 10_000));
            engine.meet().expect("all");

            let words = match (me, engine.prompt(LARGE).expect_err("no room")) {
                (1, Error::OutOfMemory(fault)) => fault.to_string(),
                (0, Error::Comm(CommError::RankFailed { rank: 1, cause })) => cause,
                (_, other) => panic!("rank {me}: {other:?}"),
            };
            for part in ARITHMETIC {
                assert!(words.contains(part), "rank {me}: {part} in {words}");
            }
            let again = engine.prompt(5).expect_err("not before it is rebuilt");
            assert!(again.to_string().contains("rank 1"), "rank {me}: {again}");

            engine.comm.rebuild().expect("a rebuild");
            assert_eq!(engine.prompt(5).expect("it answers"), before);
            engine.meet().expect("all");
            drop(hog);
            engine.meet().expect("all");
            // With the memory back there is room.
            engine.prompt(LARGE).expect("a step")
        });
        assert_eq!(large[0], large[1]);
    });
}

/// The same of a group that owns its ranks' threads, with the memory that it takes by default.
#[test]
fn a_group_whose_device_is_full_in_the_middle_says_so_and_can_be_rebuilt() {
    if !test_driver::is_virtual() {
        test_driver::skipped("takes all memory of a device");
        return;
    }
    let this = "a_group_whose_device_is_full_in_the_middle_says_so_and_can_be_rebuilt";
    test_driver::in_a_child_with(this, &[("VGPU_MEMORY", "600000000")], || {
        let _driver = test_driver::take().expect("a driver");
        // As many rows as one of the longest sequences, so often that they do not fit.
        let (sequences, length, blocks) = (640, 256, 16);
        let options = GroupOptions {
            tp: 2,
            devices: Some(vec![0, 1]),
            dtype: Some(DType::F32),
            num_blocks: Some(sequences * blocks),
            ..Default::default()
        };
        let mut group = load(MODEL, options).expect("a group");
        let small = batch(&some_ids(VOCAB, 3, 5), 0, 5, &[7]);
        let before = bits(&group.forward(&small).expect("logits"));

        let _hog = fill(1, 10_000_000);
        let ids = some_ids(VOCAB, 1, length);
        let mut large = Batch::new();
        for sequence in 0..sequences {
            let first = (sequence * blocks) as u32;
            let table: Vec<u32> = (first..first + blocks as u32).collect();
            large.push(&ids, 0, length as u32, &table);
        }
        large.logits_rows = vec![0];
        let error = group.forward(&large).expect_err("no room");
        assert!(matches!(error, Error::OutOfMemory(_)), "{error}");
        for part in ARITHMETIC {
            assert!(error.to_string().contains(part), "{part} in {error}");
        }
        group.forward(&small).expect_err("not before it is rebuilt");

        group.rebuild().expect("a rebuild");
        assert_eq!(bits(&group.forward(&small).expect("logits")), before);
        let again = group.forward(&large).expect_err("still no room");
        assert!(matches!(again, Error::OutOfMemory(_)), "{again}");
    });
}
