// C++ exceptions: through many frames, caught and rethrown, out of destructors, from inlined functions, nested in one another, and in threads.
#include "check.h"
#include <exception>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

static thread_local long cleanups;
struct Guard {
    ~Guard() { cleanups++; }
};

TRACED long descend(long depth) {
    Guard guard;
    if (depth == 0) throw std::runtime_error("the bottom");
    return OPAQUE(descend(depth - 1)) + 1;
}

TRACED long rethrow(long depth) {
    try {
        return descend(depth) + 1;
    } catch (const std::exception &) {
        cleanups += 1000;
        throw;
    }
}

struct ThrowsInDestructor {
    TRACED ~ThrowsInDestructor() noexcept(false) { throw std::string("a destructor"); }
};

TRACED long destroy(void) {
    Guard guard;
    ThrowsInDestructor thrower;
    return cleanups;
}

static inline __attribute__((always_inline)) void throw_inlined(long value) {
    Guard guard;
    if (value % 3 == 0) throw value;
}

TRACED long call_inlined(long value) {
    try {
        throw_inlined(value);
    } catch (long caught) {
        return -caught;
    }
    return value;
}

// While one exception is on its way, a destructor throws and catches another.
struct CatchesInDestructor {
    TRACED ~CatchesInDestructor() {
        try {
            descend(5);
        } catch (const std::exception &) {
            cleanups += 100000;
        }
    }
};

TRACED long nested(void) {
    CatchesInDestructor catcher;
    throw 7;
}

TRACED std::exception_ptr keep(void) {
    try {
        rethrow(3);
    } catch (...) {
        return std::current_exception();
    }
    return nullptr;
}

TRACED long all(void) {
    long sum = 0;
    for (long round = 0; round < 50; round++) {
        try {
            descend(40);
        } catch (const std::runtime_error &error) {
            sum += std::string(error.what()).size();
        }
        try {
            rethrow(10);
        } catch (const std::exception &error) {
            sum += 1;
        }
        try {
            destroy();
        } catch (const std::string &text) {
            sum += text.size();
        }
        for (long value = 0; value < 9; value++) sum += call_inlined(value);
        try {
            nested();
        } catch (int value) {
            sum += value;
        }
        auto kept = keep();
        try {
            std::rethrow_exception(kept);
        } catch (const std::exception &error) {
            sum += error.what()[0];
        }
    }
    return sum * 1000 + cleanups % 1000;
}

int main(void) {
    printf("alone %ld\n", all());
    std::vector<std::thread> threads;
    std::vector<long> results(8);
    for (long &result : results) threads.emplace_back([&result] { result = all(); });
    for (std::thread &thread : threads) thread.join();
    for (long result : results) printf("thread %ld\n", result);
    tell_calls("all", 9);
    tell_calls("nested", 9 * 50);
    tell_calls("call_inlined", 9 * 50 * 9);
    tell_calls("destroy", 9 * 50);
    tell_calls("rethrow", 9 * 50 * 2);
    tell_calls("descend", 9L * 50 * (41 + 11 + 6 + 4));
    return 17;
}
