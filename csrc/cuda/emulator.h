// The kernels of csrc/cuda on a CPU, for checking their values where there is no GPU. Slow: a thread is a fiber.
#pragma once

#include <cstddef>
#include <cstdint>

namespace lightning {

// Whether this build can: it needs the contexts of glibc.
bool can_emulate();

// Runs the kernel called `name` for `blocks` blocks, with `shared` bytes of shared memory, on its parameter struct.
// Throws std::invalid_argument for a name that is not there or a struct of another size, std::logic_error where threads of a
// block wait for each other in vain, or shared memory is written beyond `shared`.
void emulate(const char* name, int64_t blocks, size_t shared, const void* parameters, size_t bytes);

}  // namespace lightning
