//! trapline's agent: the code that runs inside a traced process.
