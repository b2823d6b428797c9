//! Programs by their images: whoever loads the same image again, on whichever device, gets what
//! has been unpacked, parsed and lowered before. A group of ranks loads every image on all of its
//! devices.

use std::sync::Arc;

use rustc_hash::FxHashMap;

use super::image::{self, Image};
use super::status::Status;
use super::{Driver, explain};
use crate::loader::Program;
use crate::ptx;

/// Bytes of PTX whose programs are kept; with more, all are forgotten, and begin anew. (Whoever
/// holds one keeps it.) What is made of a text takes some thirty times as much.
const MOST_BYTES: usize = 32 << 20;

/// Programs by the whole of their images.
#[derive(Default)]
pub(super) struct Programs {
    known: FxHashMap<Vec<u8>, Arc<Program>>,
    /// Bytes of their PTX.
    bytes: usize,
}

impl Driver {
    /// The program of an image, for the devices of this machine.
    pub(super) fn program(&mut self, image: &Image) -> Result<Arc<Program>, Status> {
        let content = image.content()?;
        if let Some(program) = self.programs.known.get(&content) {
            return Ok(program.clone());
        }
        let arch = self.machine.world.config.arch;
        let text = image::ptx(&content, arch)?;
        let program = Arc::new(Program::new(parse(&text, arch)?));
        let programs = &mut self.programs;
        if programs.bytes + text.len() > MOST_BYTES {
            *programs = Programs::default();
        }
        programs.bytes += text.len();
        programs.known.insert(content, program.clone());
        Ok(program)
    }
}

/// PTX, parsed, for a device of this architecture.
fn parse(text: &str, arch: u32) -> Result<ptx::ast::Module, Status> {
    let name = "cuModuleLoadData";
    let module = ptx::parse(text).map_err(|error| {
        explain(name, error);
        Status::INVALID_PTX
    })?;
    if module.arch > arch {
        explain(
            name,
            format_args!("PTX for {}, the device is {arch}", module.arch),
        );
        return Err(Status::NO_BINARY_FOR_GPU);
    }
    Ok(module)
}
