//! What a debugger is told of a patch that is in a process.
//!
//! Owns [`SymbolFile`]: an ELF file of a patch's functions at the addresses that they have in one process, with their unwind tables and without their code, which is
//! in the process. Neighbour: whoever looks at the process fills it in. Invariant: pure; debuggers find each function by its name, and its caller.

use object::{
    Endianness, elf,
    write::elf::{FileHeader, SectionHeader, Sym, Writer},
};
use trapline_engine::{Addr, AddrRange, Mode};

/// What is written for a debugger.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SymbolFile {
    /// The width of the code.
    pub mode: Mode,
    /// Where all code is.
    pub code: AddrRange,
    /// Its functions.
    pub functions: Vec<(String, AddrRange)>,
    /// The unwind tables as they are in the process, and where.
    pub unwind: Option<(Addr, Vec<u8>)>,
}

impl SymbolFile {
    /// The file's bytes.
    ///
    /// # Errors
    /// It would be larger than its format allows.
    pub fn encode(&self) -> Result<Vec<u8>, object::write::Error> {
        let (is_64, machine) = match self.mode {
            Mode::Bits32 => (false, elf::EM_386),
            Mode::Bits64 => (true, elf::EM_X86_64),
        };
        let mut bytes = Vec::new();
        let mut writer = Writer::new(Endianness::Little, is_64, &mut bytes);
        writer.reserve_file_header();
        writer.reserve_null_section_index();
        let code_name = writer.add_section_name(b".text");
        let code = writer.reserve_section_index();
        let tables = self.unwind.as_ref().map(|(at, tables)| {
            let name = writer.add_section_name(b".eh_frame");
            writer.reserve_section_index();
            (name, *at, tables, writer.reserve(tables.len() as u64, u64::from(self.mode.word_bytes())))
        });
        writer.reserve_null_symbol_index();
        let mut names = Vec::with_capacity(self.functions.len());
        for (name, _) in &self.functions {
            names.push(writer.add_string(name.as_bytes()));
            writer.reserve_symbol_index(Some(code));
        }
        writer.reserve_symtab_section_index();
        writer.reserve_strtab_section_index();
        writer.reserve_shstrtab_section_index();
        writer.reserve_symtab();
        writer.reserve_strtab()?;
        writer.reserve_shstrtab()?;
        writer.reserve_section_headers();

        writer.write_file_header(&FileHeader {
            os_abi: elf::ELFOSABI_NONE,
            abi_version: 0,
            e_type: elf::ET_EXEC,
            e_machine: machine,
            e_entry: 0,
            e_flags: elf::FileFlags(0),
        })?;
        if let Some((_, _, tables, offset)) = &tables {
            writer.pad_until(*offset);
            writer.write(tables);
        }
        writer.write_null_symbol();
        for (name, (_, range)) in names.into_iter().zip(&self.functions) {
            writer.write_symbol(&Sym {
                section: Some(code.0),
                st_name: writer.string_offset(Some(name)),
                st_info: elf::SymbolInfo::new(elf::STB_GLOBAL, elf::STT_FUNC),
                st_other: elf::SymbolOther(0),
                st_shndx: elf::SymbolSection(0),
                st_value: range.start.value(),
                st_size: range.len_bytes(),
            });
        }
        writer.write_strtab();
        writer.write_shstrtab();
        writer.write_null_section_header();
        let code_name = writer.section_name_offset(Some(code_name));
        let flags = elf::SHF_ALLOC | elf::SHF_EXECINSTR;
        writer.write_section_header(&section(code_name, elf::SHT_NOBITS, flags, self.code, 0));
        if let Some((name, at, tables, offset)) = tables {
            let range = AddrRange::new(at, tables.len() as u64);
            let name = writer.section_name_offset(Some(name));
            writer.write_section_header(&section(name, elf::SHT_PROGBITS, elf::SHF_ALLOC, range, offset));
        }
        writer.write_symtab_section_header(1);
        writer.write_strtab_section_header();
        writer.write_shstrtab_section_header();
        Ok(bytes)
    }
}

fn section(
    sh_name: u32,
    sh_type: elf::SectionType,
    sh_flags: elf::SectionFlags,
    range: AddrRange,
    sh_offset: u64,
) -> SectionHeader {
    SectionHeader {
        sh_name,
        sh_type,
        sh_flags,
        sh_addr: range.start.value(),
        sh_offset,
        sh_size: range.len_bytes(),
        sh_link: 0,
        sh_info: 0,
        sh_addralign: 1,
        sh_entsize: 0,
    }
}
