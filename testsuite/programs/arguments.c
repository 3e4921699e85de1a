// Arguments and results of every class of the psABI: integers beyond registers, structs in registers and in memory, floating point, vectors,
// x87, complex, 128 bits, variadic with and without floating point, nested functions with a static chain.
#include "check.h"
#include <complex.h>
#include <immintrin.h>
#include <stdarg.h>
#include <string.h>

typedef struct { long a, b; } Pair;
typedef struct { double a; long b; } Mixed;
typedef struct { float a, b, c; } Floats;
typedef struct { long words[5]; } Large;
typedef float Vector __attribute__((vector_size(16)));

TRACED long many(long a, long b, long c, long d, long e, long f, long g, long h, int i) { return a + 2 * b + 3 * c + 4 * d + 5 * e + 6 * f + 7 * g + 8 * h + 9 * i; }
TRACED Pair pair(Pair in, long by) { return (Pair){in.b + by, in.a - by}; }
TRACED Mixed mixed(Mixed in) { return (Mixed){in.b * 0.5, (long)(in.a * 4)}; }
TRACED Floats floats(Floats in) { return (Floats){in.c, in.a, in.b}; }
TRACED Large large(Large in, long by) {
    for (int word = 0; word < 5; word++) in.words[word] += by * word;
    return in;
}
TRACED double doubles(double a, double b, double c, double d, double e, double f, double g, double h, double i) { return a - b + c - d + e - f + g - h + i; }
TRACED long double extended(long double a, long b) { return a * 3 + b; }
TRACED double complex complex_double(double complex in) { return in * (1 + 2 * I); }
TRACED long double complex complex_extended(long double complex in) { return in * (2 - 1 * I); }
TRACED float complex complex_float(float complex in) { return in * (1 - 3 * I); }
#ifdef __SIZEOF_INT128__
TRACED __int128 wide(__int128 in, int by) { return in * by + 1; }
#endif
#ifdef __i386__
// What only i386 has: arguments in registers, arguments that the function takes off the stack, and both.
TRACED __attribute__((stdcall)) long takes_off(long a, long b, long c) { return a * 100 + b * 10 + c; }
TRACED __attribute__((fastcall)) long in_two_registers(long a, long b, long c) { return a * 100 + b * 10 + c; }
TRACED __attribute__((regparm(3))) long in_three_registers(long a, long b, long c, long d) { return a * 1000 + b * 100 + c * 10 + d; }
TRACED long long in_a_pair(long a, long long b) { return b * 3 + a; }
#endif
TRACED Vector vector(Vector a, Vector b) { return a * b + a; }
__attribute__((target("avx"))) TRACED __m256d vector_256(__m256d a, __m256d b) { return _mm256_add_pd(_mm256_mul_pd(a, b), a); }
TRACED _Bool boolean(int in) { return in > 2; }
TRACED double variadic(int count, ...) {
    va_list list;
    va_start(list, count);
    double sum = 0;
    for (int argument = 0; argument < count; argument++) sum += argument % 2 ? va_arg(list, double) : (double)va_arg(list, long);
    va_end(list);
    return sum;
}
TRACED long apply(long (*function)(long), long value) { return function(value); }

__attribute__((target("avx"))) static double sum_of_256(long round) {
    double out[4];
    _mm256_storeu_pd(out, vector_256(_mm256_set_pd(1, 2, 3, (double)round), _mm256_set1_pd(2)));
    return out[0] + out[1] * 10 + out[2] * 100 + out[3] * 1000;
}

int main(void) {
    double total = 0;
    for (long round = 0; round < 1000; round++) {
        total += (double)many(round, 2, 3, 4, 5, 6, 7, 8, 9);
        Pair a = pair((Pair){round, 5}, 3);
        Mixed m = mixed((Mixed){(double)round, a.a});
        Floats f = floats((Floats){(float)round, 2, 3});
        Large l = large((Large){{1, 2, 3, 4, round}}, 2);
        total += (double)(a.a + a.b + m.b) + m.a + f.a + 2 * f.b + 3 * f.c + (double)(l.words[4] + l.words[1]);
        total += doubles(1, 2, 3, 4, 5, 6, 7, 8, (double)round);
        total += (double)extended((long double)round, 2);
        double complex z = complex_double((double)round + 3 * I);
        long double complex y = complex_extended((long double)round - 2 * I);
        float complex x = complex_float(2 + 1 * I);
        total += creal(z) + cimag(z) + (double)(creall(y) + cimagl(y)) + crealf(x) + cimagf(x);
#ifdef __SIZEOF_INT128__
        total += (double)(long)(wide(((__int128)1 << 70) + round, 3) >> 68);
#endif
#ifdef __i386__
        total += (double)takes_off(round, 2, 3) + (double)in_two_registers(round, 4, 5) + (double)in_three_registers(round, 6, 7, 8);
        total += (double)in_a_pair(round, 1LL << 40);
#endif
        Vector v = vector((Vector){1, 2, 3, (float)round}, (Vector){2, 2, 2, 2});
        total += v[0] + v[1] + v[2] + v[3];
        if (__builtin_cpu_supports("avx")) total += sum_of_256(round);
        total += boolean((int)round % 5);
        total += variadic(9, 1L, 2.5, 3L, 4.5, 5L, 6.5, 7L, 8.5, round);
        // GCC hands the frame of a nested function's parent over in a register that a call may otherwise destroy.
        long nested(long value) { return value + round; }
        total += (double)nested(3);
    }
    printf("total %.3f\n", total);
    tell_calls("many", 1000);
    tell_calls("complex_extended", 1000);
    tell_calls("variadic", 1000);
#ifdef __SIZEOF_INT128__
    tell_calls("wide", 1000);
#else
    tell_calls("takes_off", 1000);
    tell_calls("in_three_registers", 1000);
#endif
    return 0;
}
