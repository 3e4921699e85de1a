// The library of library_exceptions.cpp and dlopen.c.
#include "check.h"

extern "C" TRACED long library_call(long (*callback)(long), long value) {
    if (value % 5 == 4) throw 3;
    return callback(value) + 1;
}

extern "C" TRACED long library_catch(long (*callback)(long), long value) {
    try {
        return callback(value);
    } catch (...) {
        return -1;
    }
}

extern "C" TRACED long library_work(long value) { return value * 3 + 1; }
