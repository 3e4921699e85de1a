// Exceptions that cross a shared library in both directions.
#include "check.h"
#include <stdexcept>
#include <string>

extern "C" long library_call(long (*callback)(long), long value);
extern "C" long library_catch(long (*callback)(long), long value);

extern "C" TRACED long throws_back(long value) {
    if (value % 2) throw std::out_of_range("odd " + std::to_string(value));
    return value;
}

int main(void) {
    long caught = 0, sum = 0;
    for (long value = 0; value < 500; value++) {
        try {
            sum += library_call(throws_back, value);
        } catch (const std::out_of_range &) {
            caught++;
        } catch (int from_library) {
            sum += from_library;
        }
        sum += library_catch(throws_back, value);
    }
    printf("caught %ld sum %ld\n", caught, sum);
    // The library throws 100 times before it gets there.
    tell_calls("throws_back", 900);
    return 0;
}
