//! The shadows of a process's stacks, as its recorder reads them.
//!
//! Owns [`blocks`], which stacks have a shadow and where, and [`return_of`], [`return_at`] and [`return_in`], what those say. The agent's side is its `shadow` module; the layouts are
//! `trapline_abi::thread`'s. Invariant: nothing is changed.

use std::io;

use trapline_abi::{
    agent::{POPPED_SHIFT, POPPED_UNKNOWN, SHADOW_ENTRIES, SHADOW_MAPPED, SHADOW_STATE_BITS},
    thread::{BLOCK_SHIFT, SHADOW_BYTES, SHADOW_RETURN, narrow, shadow_address},
};
use trapline_engine::{Addr, AddrRange, Mode};

use crate::{space::AgentAt, sys::memory::Memory};

/// Bytes of shadow for each word of a stack.
pub(crate) const BYTES: usize = 16;

const _: () = assert!(SHADOW_BYTES == BYTES as u64 && narrow::SHADOW_BYTES as usize == BYTES);

/// A block of stack that has a shadow.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Block {
    /// Its beginning.
    pub(crate) stack: Addr,
    /// The shadow of all of it.
    pub(crate) shadow: AddrRange,
}

/// All blocks that have one.
pub(crate) fn blocks(agent: &AgentAt, memory: &Memory) -> io::Result<Vec<Block>> {
    let (entries, block_shift, word_bytes) = match agent.mode {
        Mode::Bits32 => (narrow::BLOCKS, narrow::BLOCK_SHIFT, 4),
        Mode::Bits64 => (SHADOW_ENTRIES, BLOCK_SHIFT, 8),
    };
    let table = memory.read_vec(agent.shadows, entries as usize * size_of::<u32>())?;
    let len_bytes = (BYTES as u64 / word_bytes) << block_shift;
    let block = |(index, entry): (u64, u32)| {
        let (block, shadow) = match agent.mode {
            Mode::Bits32 => (index, narrow::shadow_address(entry, 0)?.into()),
            Mode::Bits64 => {
                let is_mapped = entry & ((1 << SHADOW_STATE_BITS) - 1) == SHADOW_MAPPED;
                let block = u64::from(entry >> SHADOW_STATE_BITS);
                (block, is_mapped.then(|| shadow_address(block << block_shift))?)
            }
        };
        Some(Block { stack: Addr::new(block << block_shift), shadow: AddrRange::new(Addr::new(shadow), len_bytes) })
    };
    let entries = table.as_chunks().0.iter().map(|bytes| u32::from_le_bytes(*bytes));
    let mut blocks: Vec<Block> = (0..).zip(entries).filter_map(block).collect();
    blocks.sort_unstable_by_key(|block| block.stack);
    Ok(blocks)
}

/// Where a function returns to that has just come to the return code; `None` if no shadow says so. `stack` is the stack pointer then.
pub(crate) fn return_of(agent: &AgentAt, memory: &Memory, stack: Addr) -> io::Result<Option<Addr>> {
    match agent.mode {
        Mode::Bits32 => narrow_return_of(agent, memory, stack),
        Mode::Bits64 => {
            let shadow = shadow_address(stack.offset(-8).value()) + SHADOW_RETURN;
            memory.read_word(Addr::new(shadow)).map(|address| Some(Addr::new(address)))
        }
    }
}

/// Where the function returns to whose return address was in a slot that is hooked; `None` if no shadow says so. `page` is what was read last, of a process that has not
/// gone on since: shadows of neighbours are neighbours.
pub(crate) fn return_at(agent: &AgentAt, memory: &Memory, slot: Addr, page: &mut Option<Page>) -> Option<u64> {
    const PAGE_BYTES: u64 = 4096;
    let shadow = match agent.mode {
        Mode::Bits64 => shadow_address(slot.value()),
        Mode::Bits32 => {
            let address = u32::try_from(slot.value()).ok()?;
            let entry = agent.shadows.after((address >> narrow::BLOCK_SHIFT) as usize * size_of::<u32>());
            let entry = memory.read_pointer(agent.mode, entry).ok()?;
            narrow::shadow_address(u32::try_from(entry).ok()?, address)?.into()
        }
    };
    let start = Addr::new(shadow & !(PAGE_BYTES - 1));
    if page.as_ref().is_none_or(|page| page.at != start) {
        *page = Some(Page { at: start, bytes: memory.read_vec(start, usize::try_from(PAGE_BYTES).ok()?).ok()? });
    }
    let bytes = page.as_ref()?.bytes.get(usize::try_from(shadow % PAGE_BYTES).ok()?..)?;
    return_in(agent.mode, slot, bytes.get(..BYTES)?)
}

/// A page of shadows.
#[derive(Debug)]
pub(crate) struct Page {
    at: Addr,
    bytes: Vec<u8>,
}

/// The same at 32 bit, where the function may have taken arguments off the stack too: as `trapline_return` does it.
fn narrow_return_of(agent: &AgentAt, memory: &Memory, stack: Addr) -> io::Result<Option<Addr>> {
    for popped in 0..POPPED_UNKNOWN {
        let slot = stack.offset(-4 - 4 * i64::from(popped));
        let Ok(address) = u32::try_from(slot.value()) else { continue };
        let entry =
            memory.read_pointer(agent.mode, agent.shadows.after((address >> narrow::BLOCK_SHIFT) as usize * 4))?;
        let Some(shadow) = narrow::shadow_address(u32::try_from(entry).unwrap_or(0), address) else { continue };
        let bytes = memory.read_vec(Addr::new(shadow.into()), 16)?;
        let pops = field(&bytes, narrow::SHADOW_DEPTH) >> POPPED_SHIFT;
        if let (Some(to), true) = (return_in(agent.mode, slot, &bytes), pops == popped || pops == POPPED_UNKNOWN) {
            return Ok(Some(Addr::new(to)));
        }
    }
    Ok(None)
}

fn field(shadow: &[u8], at: u32) -> u32 {
    let bytes = shadow.get(at as usize..).and_then(<[u8]>::first_chunk);
    bytes.map_or(0, |bytes| u32::from_le_bytes(*bytes))
}

/// The return address in the shadow of a slot; `None` if none was kept there.
pub(crate) fn return_in(mode: Mode, slot: Addr, shadow: &[u8]) -> Option<u64> {
    let return_address = match mode {
        Mode::Bits32 if u64::from(field(shadow, narrow::SHADOW_SLOT)) != slot.value() => 0,
        Mode::Bits32 => field(shadow, narrow::SHADOW_RETURN).into(),
        Mode::Bits64 => {
            let bytes = shadow.get(usize::try_from(SHADOW_RETURN).unwrap_or(0)..).and_then(<[u8]>::first_chunk);
            bytes.map_or(0, |bytes| u64::from_le_bytes(*bytes))
        }
    };
    (return_address != 0).then_some(return_address)
}
