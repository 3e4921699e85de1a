/*
 * The callbacks of the ops that the workload is traced with.
 *
 * stress_count touches two or three general-purpose registers and the flags, so its trampoline saves just those.
 * stress_count_and_spoil ruins all vector, mask and x87 registers, so its trampoline has to save the whole state.
 */
#include "workload.h"

/* A CallFrame of trapline_engine, as far as it is used here. */
struct stress_frame {
    unsigned long registers[STRESS_FRAME_IP];
    unsigned long ip;
};

/* Of registers.S. */
extern void stress_spoil(unsigned level);

/* Which vector registers stress_count_and_spoil ruins: VECTORS_SSE and so on. Set before anything is traced. */
unsigned stress_vectors;

/* Also called from the Rust closures among the callbacks. */
void stress_note(unsigned long ops, unsigned long ip)
{
    struct stress_counters *counters = stress_current;
    counters->seen[ops]++;
    counters->stray |= ip ^ counters->behind_site;
}

/* `data` is the number of the ops, not a pointer to anything. */
void stress_count(const struct stress_frame *frame, const void *data)
{
    stress_note((unsigned long)data, frame->ip);
}

void stress_count_and_spoil(const struct stress_frame *frame, const void *data)
{
    stress_note((unsigned long)data, frame->ip);
    stress_spoil(stress_vectors);
}
