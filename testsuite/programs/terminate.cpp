// An exception that meets noexcept, after cleanups that do not run: terminate, message on standard error, SIGABRT.
#include "check.h"
#include <stdexcept>

TRACED void thrower(int value) {
    if (value) throw std::logic_error("nobody catches this");
}

TRACED void barrier(int value) noexcept {
    thrower(value);
    printf("never\n");
}

int main(int argc, char **) {
    tell_calls("thrower", 1);
    tell_calls("barrier", 1);
    try {
        barrier(argc);
    } catch (const std::exception &) {
        printf("never caught\n");
    }
    return 0;
}
