/* blas.cu: cuBLAS, loaded when the first device opens. The daemon shares this binary and never touches a GPU: linked the usual way,
 * the library would cost it half a second at start and memory for nothing. */
#include "kernels/cuda/common.cuh"

#include <dlfcn.h>

#define TEXT_OF(x)    #x
#define TEXT(x)       TEXT_OF(x)
#define CUBLAS_SONAME "libcublas.so." TEXT(CUBLAS_VER_MAJOR)

template <typename F> static bool find(void *library, const char *name, F *ret_function)
{
    *ret_function = (F)dlsym(library, name);
    return *ret_function != NULL;
}

int cuda_blas_load(const struct cuda_blas **ret_blas)
{
    static struct cuda_blas blas;
    if (!blas.gemm_ex) {
        void *library = dlopen(CUBLAS_SONAME, RTLD_NOW | RTLD_LOCAL);
        if (library == NULL) /* where the toolkit puts it, when the loader was not told */
            library = dlopen("/usr/local/cuda/lib64/" CUBLAS_SONAME, RTLD_NOW | RTLD_LOCAL);
        if (library == NULL || !find(library, "cublasCreate_v2", &blas.create) ||
            !find(library, "cublasDestroy_v2", &blas.destroy) ||
            !find(library, "cublasSetStream_v2", &blas.set_stream) ||
            !find(library, "cublasSetWorkspace_v2", &blas.set_workspace) ||
            !find(library, "cublasSetAtomicsMode", &blas.set_atomics_mode) ||
            !find(library, "cublasSetMathMode", &blas.set_math_mode) ||
            !find(library, "cublasGemmEx_64", &blas.gemm_ex))
            return KERNEL_UNSUPPORTED;
    }
    *ret_blas = &blas;
    return KERNEL_OK;
}
