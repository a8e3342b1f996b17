// Part of both extensions: keeps them loadable with glibc 2.28, whatever glibc they are built on (manylinux_2_28).
//
// Two symbols that torch's and libstdc++'s headers use would demand a newer one. Both get a definition here, hidden, so that
// the linker finds it before glibc's.
#include <features.h>

extern "C" {

// libstdc++ reads it from glibc 2.32 on, and leaves out the atomic counting of shared_ptr where it is not 0.
__attribute__((visibility("hidden"))) extern char __libc_single_threaded;
char __libc_single_threaded = 0;

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
// torch's headers call it from 2.14 on. It moved from libdl to libc in glibc 2.34, with a new version; every glibc still has
// the first one.
void* first_dlsym(void* handle, const char* name);
#if defined(__x86_64__)
__asm__(".symver first_dlsym, dlsym@GLIBC_2.2.5");
#else
__asm__(".symver first_dlsym, dlsym@GLIBC_2.17");
#endif

__attribute__((visibility("hidden"))) void* dlsym(void* handle, const char* name);
void* dlsym(void* handle, const char* name) { return first_dlsym(handle, name); }
#endif
}
