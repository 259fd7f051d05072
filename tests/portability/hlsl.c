// Compiles HLSL with Microsoft's compilers as wgpu does: FXC (D3DCompile, shader model 5.1) and DXC
// (IDxcCompiler3, 6.2). Runs on Windows and under wine.
//
//     hlsl.exe fxc|dxc LIBRARY PATH…
//
// One line per path: `passed PATH` or `failed PATH MESSAGE`, separated by tabs.

#define COBJMACROS
#include <d3dcommon.h>
#include <fcntl.h>
#include <io.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <windows.h>

typedef HRESULT(WINAPI *D3DCompileFn)(const void *, SIZE_T, const char *, const D3D_SHADER_MACRO *, void *,
                                      const char *, const char *, UINT, UINT, ID3DBlob **, ID3DBlob **);
typedef HRESULT(WINAPI *DxcCreateInstanceFn)(REFCLSID, REFIID, void **);

// From dxcapi.h, which mingw has not; its IDxcBlob has ID3DBlob's functions.
typedef struct {
    const void *text;
    SIZE_T size;
    UINT encoding;
} DxcBuffer;

typedef struct DxcCompiler DxcCompiler;
struct DxcCompiler {
    struct {
        void *unknown[3];
        HRESULT(WINAPI *Compile)(DxcCompiler *, const DxcBuffer *, const wchar_t **, UINT32, void *, REFIID, void **);
    } *functions;
};

typedef struct DxcResult DxcResult;
struct DxcResult {
    struct {
        void *unknown[2];
        ULONG(WINAPI *Release)(DxcResult *);
        HRESULT(WINAPI *GetStatus)(DxcResult *, HRESULT *);
        HRESULT(WINAPI *GetResult)(DxcResult *, ID3DBlob **);
        HRESULT(WINAPI *GetErrorBuffer)(DxcResult *, ID3DBlob **);
    } *functions;
};

static const GUID CLSID_COMPILER = {0x73e22d93, 0xe6ce, 0x47f3, {0xb5, 0xbf, 0xf0, 0x66, 0x4f, 0x39, 0xc1, 0xb0}};
static const GUID IID_COMPILER_3 = {0x228b4687, 0x5a6a, 0x4730, {0x90, 0x0c, 0x97, 0x02, 0xb2, 0x20, 0x3f, 0x54}};
static const GUID IID_RESULT = {0x58346cda, 0xdde7, 0x4497, {0x94, 0x61, 0x6f, 0x87, 0xaf, 0x5e, 0x06, 0x59}};

#define ENABLE_STRICTNESS (1 << 11)
#define UTF_8 65001

static void *must(void *pointer, const char *what) {
    if (!pointer) {
        fprintf(stderr, "hlsl: %s (error %lu)\n", what, GetLastError());
        exit(2);
    }
    return pointer;
}

static char *read_file(const char *path, size_t *size) {
    FILE *file = must(fopen(path, "rb"), path);
    fseek(file, 0, SEEK_END);
    *size = ftell(file);
    rewind(file);
    char *text = must(malloc(*size + 1), "no memory");
    if (fread(text, 1, *size, file) != *size) {
        must(NULL, path);
    }
    fclose(file);
    return text;
}

static void report(const char *path, HRESULT status, ID3DBlob *code, ID3DBlob *message) {
    if (SUCCEEDED(status) && code && ID3D10Blob_GetBufferSize(code) > 0) {
        printf("passed\t%s\n", path);
    } else {
        printf("failed\t%s\t%08lx ", path, (unsigned long)status);
        size_t size = message ? ID3D10Blob_GetBufferSize(message) : 0;
        const char *text = message ? ID3D10Blob_GetBufferPointer(message) : NULL;
        for (size_t i = 0; i < size && text[i] && i < 2000; i++) {
            putchar(strchr("\r\n\t", text[i]) ? ' ' : text[i]);
        }
        putchar('\n');
    }
    fflush(stdout);
    if (code) ID3D10Blob_Release(code);
    if (message) ID3D10Blob_Release(message);
}

int main(int count, char **arguments) {
    if (count < 3 || (strcmp(arguments[1], "fxc") && strcmp(arguments[1], "dxc"))) {
        fprintf(stderr, "usage: hlsl.exe fxc|dxc LIBRARY PATH...\n");
        return 2;
    }
    _setmode(1, _O_BINARY);
    HMODULE library = must(LoadLibraryA(arguments[2]), arguments[2]);
    D3DCompileFn compile = NULL;
    DxcCompiler *compiler = NULL;
    if (!strcmp(arguments[1], "fxc")) {
        compile = must((void *)GetProcAddress(library, "D3DCompile"), "no D3DCompile");
    } else {
        DxcCreateInstanceFn create = must((void *)GetProcAddress(library, "DxcCreateInstance"), "no DxcCreateInstance");
        if (FAILED(create(&CLSID_COMPILER, &IID_COMPILER_3, (void **)&compiler))) {
            must(NULL, "no IDxcCompiler3");
        }
    }
    for (int at = 3; at < count; at++) {
        const char *path = arguments[at];
        size_t size;
        char *text = read_file(path, &size);
        ID3DBlob *code = NULL, *message = NULL;
        HRESULT status;
        if (compile) {
            status = compile(text, size, path, NULL, NULL, "main", "cs_5_1", ENABLE_STRICTNESS, 0, &code, &message);
        } else {
            const wchar_t *options[] = {L"-E", L"main", L"-T", L"cs_6_2", L"-HV", L"2018", L"-no-warnings", L"-Ges"};
            DxcBuffer buffer = {text, size, UTF_8};
            DxcResult *result = NULL;
            status = compiler->functions->Compile(
                compiler, &buffer, options, sizeof options / sizeof *options, NULL, &IID_RESULT, (void **)&result);
            if (SUCCEEDED(status)) {
                result->functions->GetStatus(result, &status);
                result->functions->GetResult(result, &code);
                result->functions->GetErrorBuffer(result, &message);
            }
            if (result) result->functions->Release(result);
        }
        report(path, status, code, message);
        free(text);
    }
    return 0;
}
