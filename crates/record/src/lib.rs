//! trapline's recorder: launches a program, arms it, and drains its rings into a trace file.
