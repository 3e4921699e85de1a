// Has XRay's flight data recorder keep and write all that it is told: linked to work.c, where FDR_OPTIONS says how large its buffers shall be.
#include <stdlib.h>

extern int __xray_log_select_mode(const char *mode);
extern int __xray_log_init_mode(const char *mode, const char *options);
extern int __xray_patch(void);
extern int __xray_log_finalize(void);
extern int __xray_log_flushLog(void);

enum { REGISTERED = 0, PATCHED = 1, INITIALIZED = 2, FINALIZED = 4, FLUSHED = 2 };

__attribute__((xray_never_instrument)) void tracer_start(void) {
    const char *options = getenv("FDR_OPTIONS");
    if (!options) return;
    if (__xray_log_select_mode("xray-fdr") != REGISTERED) exit(3);
    if (__xray_log_init_mode("xray-fdr", options) != INITIALIZED) exit(4);
    if (__xray_patch() != PATCHED) exit(5);
}

__attribute__((xray_never_instrument)) void tracer_stop(void) {
    if (!getenv("FDR_OPTIONS")) return;
    if (__xray_log_finalize() != FINALIZED) exit(6);
    if (__xray_log_flushLog() != FLUSHED) exit(7);
}
