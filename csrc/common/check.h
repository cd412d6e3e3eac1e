// The two checks of this code base and the errors that they throw. No Python here: pybind11 maps
// std::invalid_argument to ValueError and std::runtime_error to RuntimeError by itself.
#pragma once

#include <sstream>
#include <stdexcept>
#include <string>

namespace tml {

// A value that the caller passed cannot be accepted. ValueError in Python.
class Error : public std::invalid_argument {
 public:
  using std::invalid_argument::invalid_argument;
};

// The call is fine, but not now: started twice, ended before it began. RuntimeError in Python.
class StateError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// A CUDA call failed. RuntimeError in Python.
class CudaError : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

template <typename... Values>
std::string concat(const Values&... values) {
  std::ostringstream text;
  (text << ... << values);
  return text.str();
}

// "csrc/tick/ring.h:40: capacity > 0 is false: capacity=0"
template <typename E>
[[noreturn]] void throw_at(const char* file, int line, const char* what,
                           const std::string& values) {
  throw E(concat(file, ":", line, ": ", what, values.empty() ? "" : ": ", values));
}

}  // namespace tml

// TML_CHECK(row < num_rows, "row=", row, " num_rows=", num_rows) throws tml::Error.
#define TML_CHECK(cond, ...)                                               \
  do {                                                                     \
    if (!(cond)) {                                                         \
      ::tml::throw_at<::tml::Error>(__FILE__, __LINE__, #cond " is false", \
                                    ::tml::concat(__VA_ARGS__));           \
    }                                                                      \
  } while (false)

// Around every CUDA runtime call and, as CUDA_CHECK(cudaGetLastError()), after every launch; the
// error does not stay behind for the next check to find. Its user includes <cuda_runtime_api.h>.
#define CUDA_CHECK(call)                                                                  \
  do {                                                                                    \
    const cudaError_t tml_code = (call);                                                  \
    if (tml_code != cudaSuccess) {                                                        \
      static_cast<void>(cudaGetLastError());                                              \
      ::tml::throw_at<::tml::CudaError>(                                                  \
          __FILE__, __LINE__, #call,                                                      \
          ::tml::concat(cudaGetErrorName(tml_code), ": ", cudaGetErrorString(tml_code))); \
    }                                                                                     \
  } while (false)
