# The header, the library, and what lets others find them: the CMake package `specprefill` and a pkg-config file. Both
# find the library by their own place, so the prefix may be moved.
include(GNUInstallDirs)
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/specprefill)

install(TARGETS specprefill EXPORT specprefill ARCHIVE INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(FILES ${CMAKE_CURRENT_SOURCE_DIR}/csrc/include/specprefill.h TYPE INCLUDE)
install(FILES ${CMAKE_CURRENT_SOURCE_DIR}/LICENSE TYPE DOC)
install(EXPORT specprefill NAMESPACE specprefill:: FILE specprefill-targets.cmake DESTINATION ${package_dir})

configure_package_config_file(${CMAKE_CURRENT_LIST_DIR}/specprefill-config.cmake.in
  ${CMAKE_CURRENT_BINARY_DIR}/install/specprefill-config.cmake INSTALL_DESTINATION ${package_dir})
# Before 1.0 a minor version may change structs.
write_basic_package_version_file(${CMAKE_CURRENT_BINARY_DIR}/install/specprefill-config-version.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES
  ${CMAKE_CURRENT_BINARY_DIR}/install/specprefill-config.cmake
  ${CMAKE_CURRENT_BINARY_DIR}/install/specprefill-config-version.cmake
  DESTINATION ${package_dir})

# Only a static library: what it needs is needed always, so it stands in Libs and not in Libs.private.
list(TRANSFORM cxx_libraries PREPEND "-l" OUTPUT_VARIABLE pc_libraries)
list(APPEND pc_libraries -pthread)
set(pc_flags)
set(pc_variables)
if(SPECPREFILL_CUDA)
  set(pc_flags " -DSPECPREFILL_HAVE_CUDA -I\${cuda_includedir}")
  list(GET CUDAToolkit_INCLUDE_DIRS 0 cuda_include)
  set(pc_variables "cuda_libdir=${CUDAToolkit_LIBRARY_DIR}\ncuda_includedir=${cuda_include}\n")
  list(PREPEND pc_libraries -L\${cuda_libdir} -lcudart_static)
  list(APPEND pc_libraries -ldl -lrt)
endif()
list(JOIN pc_libraries " " pc_libraries)
cmake_path(IS_ABSOLUTE CMAKE_INSTALL_LIBDIR libdir_is_absolute)
cmake_path(IS_ABSOLUTE CMAKE_INSTALL_INCLUDEDIR includedir_is_absolute)
if(libdir_is_absolute OR includedir_is_absolute)
  set(pc_prefix ${CMAKE_INSTALL_PREFIX}) # folders that were chosen by themselves do not move together
  set(pc_libdir ${CMAKE_INSTALL_FULL_LIBDIR})
  set(pc_includedir ${CMAKE_INSTALL_FULL_INCLUDEDIR})
else()
  file(RELATIVE_PATH pc_prefix /${CMAKE_INSTALL_LIBDIR}/pkgconfig /)
  string(REGEX REPLACE "/$" "" pc_prefix "\${pcfiledir}/${pc_prefix}")
  set(pc_libdir "\${prefix}/${CMAKE_INSTALL_LIBDIR}")
  set(pc_includedir "\${prefix}/${CMAKE_INSTALL_INCLUDEDIR}")
endif()
configure_file(${CMAKE_CURRENT_LIST_DIR}/specprefill.pc.in ${CMAKE_CURRENT_BINARY_DIR}/install/specprefill.pc @ONLY)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/install/specprefill.pc DESTINATION ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
