// A kernel's arguments, kept until its threads run.
#pragma once
#include <cstddef>
#include <functional>
#include <tuple>
#include <utility>

struct Kernel {
    const char *name;
    // A copy of the arguments, as something that runs one thread.
    std::function<void()> (*bind)(void **);
};
// Every kernel by name; made by make.sh.
extern const Kernel kernel_table[];
extern const size_t n_kernels;

template <typename... Arguments, size_t... At>
std::function<void()> bind_arguments(void (*kernel)(Arguments...), void **from, std::index_sequence<At...>) {
    std::tuple<Arguments...> arguments{*static_cast<Arguments *>(from[At])...};
    return [=] { std::apply(kernel, arguments); };
}

template <auto kernel> struct Bind;
template <typename... Arguments, void (*kernel)(Arguments...)> struct Bind<kernel> {
    static std::function<void()> bind(void **from) {
        return bind_arguments(kernel, from, std::index_sequence_for<Arguments...>{});
    }
};
