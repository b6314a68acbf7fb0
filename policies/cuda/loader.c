/* CUDA's libraries, looked for when they are first used: a program that is linked with this starts without them.
 *
 * toolchain.sh makes of every function of a library a jump through a slot, which at first leads here. Where a library is
 * missing that is said once, and its functions give the status that means "not there", so that the caller's own error
 * follows. */
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

struct library {
    const char *names; /* each with its end, an empty one last */
    const char *remedy;
    int absent; /* what its functions return where there is none */
    void *handle;
    int looked_for;
};

static int absent_text(int status, const char **text) {
    (void)status;
    *text = "CUDA's driver is not installed";
    return 0;
}
/* CUDA_ERROR_NO_DEVICE, CUBLAS_STATUS_NOT_INITIALIZED (cuBLASLt's too, and NVRTC_ERROR_OUT_OF_MEMORY),
 * CURAND_STATUS_INITIALIZATION_FAILED. */
static int absent_driver(void) { return 100; }
static int absent_blas(void) { return 1; }
static int absent_random(void) { return 203; }

/* In the folders of GRPO_CUDA_LIBRARIES, parted by colons, then where the loader looks. */
static void *open_library(const char *name) {
    const char *folders = getenv("GRPO_CUDA_LIBRARIES");
    while (folders && *folders) {
        char path[4096];
        const int length = (int)strcspn(folders, ":");
        if (snprintf(path, sizeof path, "%.*s/%s", length, folders, name) < (int)sizeof path) {
            void *handle = dlopen(path, RTLD_NOW | RTLD_LOCAL);
            if (handle) return handle;
        }
        folders += length + (folders[length] == ':');
    }
    return dlopen(name, RTLD_NOW | RTLD_LOCAL);
}

void *grpo_cuda_resolve(struct library *library, const char *function);
void *grpo_cuda_resolve(struct library *library, const char *function) {
    if (!library->looked_for) {
        for (const char *name = library->names; *name && !library->handle; name += strlen(name) + 1)
            library->handle = open_library(name);
        if (!library->handle)
            fprintf(stderr, "%s is not found: %s, or name its folder in GRPO_CUDA_LIBRARIES\n", library->names, library->remedy);
        library->looked_for = 1;
    }
    void *address = library->handle ? dlsym(library->handle, function) : NULL;
    if (address) return address;
    if (library->handle) fprintf(stderr, "%s has no function %s: take the version that this program was built for\n", library->names, function);
    if (!strcmp(function, "cuGetErrorName") || !strcmp(function, "cuGetErrorString")) return (void *)&absent_text;
    if (library->absent == 100) return (void *)&absent_driver;
    return library->absent == 203 ? (void *)&absent_random : (void *)&absent_blas;
}

/* A call that has not been resolved: all registers that carry arguments are kept, the slot is filled, and the call goes
 * on. r10 is the library; the stack holds the slot's address, the function's name and where the call returns to. */
__asm__(".text\n"
        ".globl grpo_cuda_first_call\n"
        ".hidden grpo_cuda_resolve\n"
        ".type grpo_cuda_first_call, @function\n"
        "grpo_cuda_first_call:\n"
        "    pushq %rbp\n"
        "    movq %rsp, %rbp\n"
        "    subq $192, %rsp\n"
        "    movups %xmm0, (%rsp)\n    movups %xmm1, 16(%rsp)\n    movups %xmm2, 32(%rsp)\n"
        "    movups %xmm3, 48(%rsp)\n    movups %xmm4, 64(%rsp)\n    movups %xmm5, 80(%rsp)\n"
        "    movups %xmm6, 96(%rsp)\n    movups %xmm7, 112(%rsp)\n"
        "    movq %rdi, 128(%rsp)\n    movq %rsi, 136(%rsp)\n    movq %rdx, 144(%rsp)\n"
        "    movq %rcx, 152(%rsp)\n    movq %r8, 160(%rsp)\n    movq %r9, 168(%rsp)\n    movq %rax, 176(%rsp)\n"
        "    movq %r10, %rdi\n"
        "    movq 16(%rbp), %rsi\n"
        "    call grpo_cuda_resolve\n"
        "    movq %rax, %r11\n"
        "    movq 8(%rbp), %r10\n"
        "    movq %r11, (%r10)\n"
        "    movups (%rsp), %xmm0\n    movups 16(%rsp), %xmm1\n    movups 32(%rsp), %xmm2\n"
        "    movups 48(%rsp), %xmm3\n    movups 64(%rsp), %xmm4\n    movups 80(%rsp), %xmm5\n"
        "    movups 96(%rsp), %xmm6\n    movups 112(%rsp), %xmm7\n"
        "    movq 128(%rsp), %rdi\n    movq 136(%rsp), %rsi\n    movq 144(%rsp), %rdx\n"
        "    movq 152(%rsp), %rcx\n    movq 160(%rsp), %r8\n    movq 168(%rsp), %r9\n    movq 176(%rsp), %rax\n"
        "    leave\n"
        "    addq $16, %rsp\n"
        "    jmp *%r11\n"
        ".size grpo_cuda_first_call, .-grpo_cuda_first_call\n");
