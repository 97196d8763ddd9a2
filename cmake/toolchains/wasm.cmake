# WebAssembly with 128-bit SIMD, by Emscripten, run by Node.js: one thread, no libzip, no libspng.
# `scripts/install_dependencies --wasm` installs what it needs on Debian.
find_file(EMSCRIPTEN_CMAKE Emscripten.cmake REQUIRED
          PATHS $ENV{EMSDK}/upstream/emscripten /usr/share/emscripten
          PATH_SUFFIXES cmake/Modules/Platform)
# Debian's Emscripten takes acorn from Debian's folder of Node.js modules.
if(EXISTS /usr/share/nodejs/acorn)
  set(ENV{NODE_PATH} /usr/share/nodejs)
  set(CMAKE_CXX_LINKER_LAUNCHER ${CMAKE_COMMAND} -E env NODE_PATH=/usr/share/nodejs)
endif()

set(CMAKE_CXX_FLAGS_INIT "-msimd128 -fexceptions")
set(CMAKE_EXE_LINKER_FLAGS_INIT
    "-sNODERAWFS=1 -sALLOW_MEMORY_GROWTH=1 -sTOTAL_STACK=8MB -sEXIT_RUNTIME=1")

# Node.js 18 and later have a fetch() that older Emscripten takes for a browser's.
find_program(NODE_JS_EXECUTABLE NAMES nodejs node REQUIRED)
set(CMAKE_CROSSCOMPILING_EMULATOR ${NODE_JS_EXECUTABLE} --no-experimental-fetch)

include(${EMSCRIPTEN_CMAKE})

# Headers without code are those of the machine that compiles, but not all of its /usr/include.
set(headers ${CMAKE_BINARY_DIR}/headers)
foreach(folder hwy nlohmann doctest)
  find_path(MICROTOME_HOST_${folder} ${folder} PATHS /usr/local/include /usr/include REQUIRED
            NO_DEFAULT_PATH NO_CMAKE_FIND_ROOT_PATH)
  file(MAKE_DIRECTORY ${headers})
  file(CREATE_LINK ${MICROTOME_HOST_${folder}}/${folder} ${headers}/${folder} SYMBOLIC)
endforeach()
list(APPEND CMAKE_FIND_ROOT_PATH ${headers})
list(APPEND CMAKE_INCLUDE_PATH /)
