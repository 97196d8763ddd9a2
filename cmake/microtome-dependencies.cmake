# What microtome needs, found the same way when it is built and when it is used after installation.

# The headers of the runtime. Highway and xsimd are used as headers alone, so that no package
# configuration of theirs is needed.
if(NOT TARGET microtome::headers)
  add_library(microtome::headers INTERFACE IMPORTED)
  set(needed hwy/highway.h nlohmann/json.hpp)
  if(NOT EMSCRIPTEN)  # which xsimd 8 does not know: kernels/batch.hpp
    list(APPEND needed xsimd/xsimd.hpp)
  endif()
  foreach(header IN LISTS needed)
    string(MAKE_C_IDENTIFIER "MICROTOME_INCLUDE_${header}" variable)
    find_path(${variable} ${header})
    if(NOT ${variable})
      message(FATAL_ERROR "microtome needs the header <${header}> (Debian: libhwy-dev, libxsimd-dev, "
                          "nlohmann-json3-dev)")
    endif()
    set_property(TARGET microtome::headers APPEND PROPERTY
                 INTERFACE_INCLUDE_DIRECTORIES "${${variable}}")
  endforeach()
endif()

if(MICROTOME_OPENMP)
  # Apple's clang has no OpenMP library of its own; Homebrew's libomp lies outside the default paths.
  foreach(folder /opt/homebrew/opt/libomp /usr/local/opt/libomp)
    if(APPLE AND NOT OpenMP_ROOT AND EXISTS ${folder})
      set(OpenMP_ROOT ${folder})
    endif()
  endforeach()
  include(CMakeFindDependencyMacro)
  find_dependency(OpenMP COMPONENTS CXX)
endif()

# Libraries of microtome/io/: .npz archives and PNG images, and JPEG images where there is libjpeg. Debian: libzip-dev,
# libspng-dev, libjpeg-dev.
macro(microtome_find_io_libraries)
  find_package(PkgConfig REQUIRED)
  pkg_check_modules(libzip REQUIRED IMPORTED_TARGET libzip>=1.6)
  pkg_check_modules(spng REQUIRED IMPORTED_TARGET spng>=0.7)
  find_package(JPEG)
endmacro()
