//! trapline's trace file: written while recording, read as a stream, analysed.
