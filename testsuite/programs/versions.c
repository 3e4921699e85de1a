// Threads that call one function again and again, and count which version of it has answered. Each line of input is answered by one, when every thread has begun a call
// after it was read: how often the first version has answered, and how often others. A number in a line has the answer wait for so many calls more.

#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

#include "check.h"

#ifndef VERSION
#define VERSION 1
#endif

#define THREADS 2

static struct {
	_Alignas(64) atomic_ulong first, others;
} counted[THREADS];

__attribute__((noipa)) int version(int x)
{
	// Longer than a jump.
	return OPAQUE(x * 1000) / 1000 + VERSION;
}

static void *count(void *index)
{
	long at = (long)index;

	for (int x = 0;; x = (x + 1) & 0xffff)
		atomic_fetch_add_explicit(version(x) == x + 1 ? &counted[at].first : &counted[at].others, 1, memory_order_relaxed);
	return index;
}

static unsigned long calls_of(int thread)
{
	return atomic_load(&counted[thread].first) + atomic_load(&counted[thread].others);
}

int main(void)
{
	char line[64];

	// Whatever becomes of the check, this ends.
	alarm(300);
	for (long i = 0; i < THREADS; i++) {
		pthread_t thread;
		pthread_create(&thread, NULL, count, (void *)i);
	}
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		unsigned long more = strtoul(line, NULL, 10) / THREADS;
		unsigned long first = 0, others = 0;
		unsigned long until[THREADS];

		// One call may be under way, and the next one has begun after that.
		for (int i = 0; i < THREADS; i++)
			until[i] = calls_of(i) + more + 2;
		for (int i = 0; i < THREADS; i++)
			while (calls_of(i) < until[i])
				usleep(1000);
		for (int i = 0; i < THREADS; i++) {
			first += atomic_load(&counted[i].first);
			others += atomic_load(&counted[i].others);
		}
		printf("%lu %lu 0 1\n", first, others);
		fflush(stdout);
	}
	return 0;
}
