// Memory and messages without exceptions: what fails says so, and what is owned is freed.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

namespace dsr {

// The first problem that was found, as one sentence; later ones follow from it.
struct Problem {
    char text[400] = "";

    explicit operator bool() const { return text[0] != 0; }

    // Keeps a message if it is the first one. Returns false, so that a check can end with `return problem.say(...)`.
    __attribute__((format(printf, 2, 3))) bool say(const char* format, ...) {
        if (*this) return false;
        va_list arguments;
        va_start(arguments, format);
        vsnprintf(text, sizeof text, format, arguments);
        va_end(arguments);
        return false;
    }
    bool no_memory(double nbytes) {
        return say("there is no memory for %.0f bytes; use a smaller batch, or a machine with more.", nbytes);
    }
};

// An array that is freed with its owner. Its memory lies at whole cache lines. A new entry is all zeros, so that must
// be a valid state of T.
template <class T>
struct Array {
    T* data = nullptr;
    int64_t count = 0;
    void* memory = nullptr;  // what was allocated; `data` lies at the first whole cache line of it

    Array() = default;
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { clear(); }

    void clear() {
        for (int64_t i = 0; i < count; i++) data[i].~T();
        free(memory);
        memory = nullptr;
        data = nullptr;
        count = 0;
    }

    T& operator[](int64_t i) { return data[i]; }
    const T& operator[](int64_t i) const { return data[i]; }
    T* begin() { return data; }
    T* end() { return data + count; }
    const T* begin() const { return data; }
    const T* end() const { return data + count; }

    // Makes the array `number` entries of zeros. Returns false, and says so, where there is no memory.
    bool make(int64_t number, Problem& problem) {
        constexpr int64_t LINE = 64, MOST = INT64_C(1) << 44;
        clear();
        if (number < 0 || number > MOST / (int64_t)sizeof(T)) return problem.no_memory((double)number * sizeof(T));
        // The system's zeros cost nothing until they are written.
        memory = calloc(number * sizeof(T) + LINE, 1);
        if (!memory) return problem.no_memory((double)number * sizeof(T));
        data = (T*)(((uintptr_t)memory + LINE - 1) / LINE * LINE);
        count = number;
        return true;
    }
};

}  // namespace dsr
