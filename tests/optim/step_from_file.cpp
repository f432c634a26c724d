// One step of the C++ kernel on tensors that come and go through standard input and output, for processors that are
// emulated: the settings as Python has them, the number of elements, then weight, gradient, z, m.
#include "cpu.cpp"

#include <cstdio>
#include <type_traits>
#include <vector>

int main() {
    Settings s;
    int64_t size;
    if (std::fread(&s, sizeof s, 1, stdin) != 1 || std::fread(&size, sizeof size, 1, stdin) != 1) return 1;
    const int32_t dtypes[] = {s.weight_dtype, s.gradient_dtype, s.state_dtype, s.state_dtype};
    std::vector<uint8_t> memory[4];
    for (int i = 0; i < 4; i++) {
        memory[i].resize(size * bytes(dtypes[i]));
        if (std::fread(memory[i].data(), 1, memory[i].size(), stdin) != memory[i].size()) return 1;
    }
    std::remove_pointer_t<decltype(Tensors::step)> step = 6;
    const Tensors tensors{memory[0].data(), memory[1].data(), memory[2].data(), memory[3].data(), &step, size};
    stacey_step(&s, &tensors, 1, 1);
    for (int i : {0, 2, 3}) std::fwrite(memory[i].data(), 1, memory[i].size(), stdout);
}
