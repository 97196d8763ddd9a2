# 64-bit Arm Linux on Debian: the cross compiler, the libraries of Debian's arm64 packages, and qemu to
# run what was built. `scripts/install_dependencies --arm` installs them.
# QEMU_CPU in the environment chooses the CPU that qemu plays (qemu-aarch64 -cpu help).
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_LIBRARY_ARCHITECTURE aarch64-linux-gnu)
if(NOT CMAKE_CXX_COMPILER)
  set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
endif()
set(CMAKE_CXX_COMPILER_TARGET aarch64-linux-gnu)  # for clang, which compiles for any

set(CMAKE_CROSSCOMPILING_EMULATOR qemu-aarch64)

# Libraries of arm64 alone; headers without code (Highway, xsimd, CLI11) are those of the machine that
# compiles.
set(ENV{PKG_CONFIG_LIBDIR} /usr/lib/aarch64-linux-gnu/pkgconfig:/usr/share/pkgconfig)
