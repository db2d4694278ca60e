# llama-cpp-python turns llama.cpp's helper library for programs on; nothing here uses it, and it takes
# longer to compile than the rest. A variable that is set already stays.
set(LLAMA_BUILD_COMMON OFF)
