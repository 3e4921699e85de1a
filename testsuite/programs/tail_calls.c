// Tail calls, which are jumps when optimised: chains, two functions in turn, through pointers, into a variadic function, to oneself.
#include "check.h"
#include <stdarg.h>

static long evens, odds;
TRACED long is_odd(long value);
TRACED long is_even(long value) {
    evens++;
    return value == 0 ? 1 : is_odd(value - 1);
}
TRACED long is_odd(long value) {
    odds++;
    return value == 0 ? 0 : is_even(value - 1);
}

TRACED long last(long value) { return value * 2; }
TRACED long middle(long value) { return last(value + 1); }
TRACED long head(long value) { return middle(value + 1); }

static long (*volatile pointer)(long) = head;
TRACED long by_pointer(long value) { return pointer(value); }

TRACED long sum_of(int count, ...) {
    va_list list;
    va_start(list, count);
    long sum = 0;
    for (int argument = 0; argument < count; argument++) sum += va_arg(list, long);
    va_end(list);
    return sum;
}
TRACED long to_variadic(long value) { return sum_of(3, value, value + 1, value + 2); }

int main(void) {
    long sum = 0;
    for (long value = 0; value < 300; value++) sum += is_even(value) + by_pointer(value) + to_variadic(value);
    printf("sum %ld\n", sum);
    tell_calls("is_even", evens);
    tell_calls("is_odd", odds);
    tell_calls("head", 300);
    tell_calls("middle", 300);
    tell_calls("last", 300);
    tell_calls("sum_of", 300);
    return 0;
}
