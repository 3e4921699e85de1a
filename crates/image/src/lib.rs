//! trapline's view of an ELF file: its functions, and how each of them can be armed.
