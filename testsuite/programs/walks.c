// _Unwind_Backtrace() as programs call it themselves: in a library that comes and goes, or in a copy that is linked in. The callback sees each frame
// with its canonical frame address, may end the walk, may walk itself, and finds the stack aligned.
#include "check.h"
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
#include <unwind.h>

static __typeof__(_Unwind_Backtrace) *walk_frames;
static __typeof__(_Unwind_GetIP) *address_of;
static __typeof__(_Unwind_GetCFA) *frame_of;

struct Walk {
    int frames, limit, is_nested;
    uintptr_t from;
};

static _Unwind_Reason_Code on_frame(struct _Unwind_Context *context, void *argument) {
    struct Walk *walk = argument;
    // Behind the caller's frame pointer and the return address (psABI: the end of the arguments' area).
    EXPECT((((uintptr_t)__builtin_frame_address(0) + 2 * sizeof(void *)) & 15) == 0);
    if (walk->frames == walk->limit) return _URC_NORMAL_STOP;
    walk->frames++;
    Dl_info info;
    const char *name = dladdr((char *)address_of(context) - 1, &info) && info.dli_sname ? info.dli_sname : "?";
    // Further out than main, things differ from run to run.
    if (frame_of(context) <= walk->from) printf(" %s+%ld", name, (long)(walk->from - frame_of(context)));
    if (walk->is_nested) {
        struct Walk inner = {.limit = 1000, .from = 0};
        EXPECT(walk_frames(on_frame, &inner) == _URC_END_OF_STACK && inner.frames > walk->frames);
        printf("(%d)", inner.frames);
    }
    return _URC_NO_REASON;
}

static long calls;
TRACED long descend(long depth, struct Walk *walk) {
    calls++;
    if (depth == 0) return walk_frames(on_frame, walk);
    return OPAQUE(descend(depth - 1, walk));
}

static void walks(void) {
    uintptr_t from = (uintptr_t)__builtin_frame_address(0);
    struct Walk all = {.limit = 1000, .from = from}, some = {.limit = 4, .from = from};
    struct Walk nested = {.limit = 1000, .from = from, .is_nested = 1};
    long ends[3] = {descend(9, &all), descend(6, &some), descend(3, &nested)};
    printf("\nends %ld %ld %ld frames %d %d %d\n", ends[0], ends[1], ends[2], all.frames, some.frames, nested.frames);
}

int main(void) {
#ifdef LINKED
    walk_frames = _Unwind_Backtrace, address_of = _Unwind_GetIP, frame_of = _Unwind_GetCFA;
    walks();
#else
    for (int round = 0; round < 4; round++) {
        EXPECT(dlopen("libgcc_s.so.1", RTLD_NOW | RTLD_NOLOAD) == 0);
        void *library = dlopen("libgcc_s.so.1", RTLD_NOW);
        EXPECT(library != 0);
        walk_frames = (__typeof__(walk_frames))dlsym(library, "_Unwind_Backtrace");
        address_of = (__typeof__(address_of))dlsym(library, "_Unwind_GetIP");
        frame_of = (__typeof__(frame_of))dlsym(library, "_Unwind_GetCFA");
        walks();
        EXPECT(dlclose(library) == 0);
    }
#endif
    tell_calls("descend", calls);
    return 0;
}
