//! The block allocator hands no block out twice and loses none.

use std::collections::BTreeSet;

use proptest::prelude::*;
use ringtp::generate::BlockAllocator;

proptest! {
    #[test]
    fn every_block_has_one_owner(
        num_blocks in 0..40_usize,
        steps in prop::collection::vec((any::<bool>(), 0..12_usize), 0..60),
    ) {
        let mut allocator = BlockAllocator::new(num_blocks);
        let mut tables: Vec<Vec<u32>> = Vec::new();
        for (take, n) in steps {
            if take {
                let mut table = Vec::new();
                let fits = n <= allocator.num_free();
                prop_assert_eq!(allocator.allocate(n, &mut table).is_ok(), fits);
                prop_assert_eq!(table.len(), if fits { n } else { 0 });
                tables.push(table);
            } else if !tables.is_empty() {
                let mut table = tables.swap_remove(n % tables.len());
                prop_assert!(allocator.free(&mut table).is_ok());
                prop_assert!(table.is_empty());
            }
            let owned = tables.concat();
            let distinct: BTreeSet<_> = owned.iter().copied().collect();
            prop_assert_eq!(distinct.len(), owned.len());
            prop_assert!(distinct.iter().all(|&block| (block as usize) < num_blocks));
            prop_assert_eq!(owned.len() + allocator.num_free(), num_blocks);
        }
    }
}

#[test]
fn freeing_twice_is_an_error_that_changes_nothing() {
    let mut allocator = BlockAllocator::new(4);
    let mut table = Vec::new();
    allocator.allocate(3, &mut table).expect("three are free");
    let mut copy = table.clone();
    for mut bad in [
        vec![table[0], table[1], table[0]],
        vec![table[0], 3],
        vec![4],
    ] {
        let before = bad.clone();
        let error = allocator.free(&mut bad).expect_err("not its blocks");
        assert!(error.to_string().contains("block"), "{error}");
        assert_eq!((bad, allocator.num_free()), (before, 1));
    }
    allocator.free(&mut table).expect("its own blocks");
    allocator.free(&mut copy).expect_err("free already");
    assert_eq!(allocator.num_free(), 4);
}

#[test]
fn what_is_not_there_is_out_of_memory() {
    let mut allocator = BlockAllocator::new(2);
    let mut table = Vec::new();
    let error = allocator.allocate(3, &mut table).expect_err("only two");
    assert!(!error.is_input() && table.is_empty(), "{error}");
}
