// Compiles SPIR-V compute kernels with the first Vulkan device, which need not be a real one, and prints what its
// compiler says of them. Reads paths from stdin, one a line, and answers each with lines of fields between tabs:
//   device NAME             once, the driver's version in brackets
//   stat SUBGROUP NAME=VALUE ...  per executable (VK_KHR_pipeline_executable_properties)
//   done RESULT MILLISECONDS      VkResult, and the processor time of the compilation
// A compilation that takes more than SECONDS of processor time ends the program by SIGPROF.
// call: compile SECONDS FOLDER. Of a path with a + before it, the listing is written there, as NAME.SUBGROUP.txt.
#define _GNU_SOURCE
#include <ctype.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/time.h>
#include <time.h>
#include <vulkan/vulkan.h>

#define MOST 32

static double processor_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void limit(long seconds) {
    struct itimerval timer = {{0, 0}, {seconds, 0}};
    setitimer(ITIMER_PROF, &timer, 0);
}

static void need(VkResult result, const char *what) {
    if (result != VK_SUCCESS) {
        fprintf(stderr, "%s: VkResult %d\n", what, result);
        exit(3);
    }
}

static VkDevice device;
static const char *folder;
static PFN_vkGetPipelineExecutablePropertiesKHR get_properties;
static PFN_vkGetPipelineExecutableStatisticsKHR get_statistics;
static PFN_vkGetPipelineExecutableInternalRepresentationsKHR get_representations;

struct binding {
    uint32_t set, number;
    VkDescriptorType type;
};

// The bindings of a module: variables of class Uniform (2) and StorageBuffer (12).
static uint32_t reflect(const uint32_t *words, size_t count, struct binding *out) {
    uint32_t bound = words[3], found = 0;
    uint32_t *set = calloc(bound, 4), *number = calloc(bound, 4), *class = calloc(bound, 4);
    for (size_t i = 5; i < count;) {
        uint32_t op = words[i] & 0xffff, length = words[i] >> 16;
        if (!length) break;
        if (op == 71 && words[i + 2] == 34) set[words[i + 1]] = words[i + 3];
        if (op == 71 && words[i + 2] == 33) number[words[i + 1]] = words[i + 3];
        if (op == 59) class[words[i + 2]] = words[i + 3];
        i += length;
    }
    for (uint32_t id = 0; id < bound && found < MOST; id++) {
        if (class[id] == 2) out[found++] = (struct binding){set[id], number[id], VK_DESCRIPTOR_TYPE_UNIFORM_BUFFER};
        if (class[id] == 12) out[found++] = (struct binding){set[id], number[id], VK_DESCRIPTOR_TYPE_STORAGE_BUFFER};
    }
    free(set);
    free(number);
    free(class);
    return found;
}

static void write_listings(VkPipelineExecutableInfoKHR *info, const char *path, uint32_t subgroup) {
    uint32_t count = 0;
    get_representations(device, info, &count, 0);
    VkPipelineExecutableInternalRepresentationKHR *all = calloc(count + 1, sizeof *all);
    for (uint32_t i = 0; i < count; i++)
        all[i].sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INTERNAL_REPRESENTATION_KHR;
    get_representations(device, info, &count, all);
    for (uint32_t i = 0; i < count; i++) all[i].pData = calloc(1, all[i].dataSize + 1);
    get_representations(device, info, &count, all);
    for (uint32_t i = 0; i < count; i++) {
        // The last step is what the processor runs: "Assembly", "NAK assembly", "GEN Assembly".
        if (strcasestr(all[i].name, "assembly")) {
            char to[4096];
            const char *base = strrchr(path, '/');
            snprintf(to, sizeof to, "%s/%s.%u.txt", folder, base ? base + 1 : path, subgroup);
            FILE *file = fopen(to, "w");
            if (file) {
                fwrite(all[i].pData, 1, strnlen(all[i].pData, all[i].dataSize), file);
                fclose(file);
            }
        }
        free(all[i].pData);
    }
    free(all);
}

static void print_statistics(VkPipeline pipeline, const char *path, int listing) {
    VkPipelineInfoKHR of = {VK_STRUCTURE_TYPE_PIPELINE_INFO_KHR, 0, pipeline};
    uint32_t executables = 0;
    get_properties(device, &of, &executables, 0);
    VkPipelineExecutablePropertiesKHR *properties = calloc(executables + 1, sizeof *properties);
    for (uint32_t i = 0; i < executables; i++)
        properties[i].sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_PROPERTIES_KHR;
    get_properties(device, &of, &executables, properties);
    for (uint32_t i = 0; i < executables; i++) {
        printf("stat\t%u", properties[i].subgroupSize);
        VkPipelineExecutableInfoKHR info = {VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_INFO_KHR, 0, pipeline, i};
        uint32_t count = 0;
        get_statistics(device, &info, &count, 0);
        VkPipelineExecutableStatisticKHR *all = calloc(count + 1, sizeof *all);
        for (uint32_t j = 0; j < count; j++) all[j].sType = VK_STRUCTURE_TYPE_PIPELINE_EXECUTABLE_STATISTIC_KHR;
        get_statistics(device, &info, &count, all);
        for (uint32_t j = 0; j < count; j++) {
            if (all[j].format == VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_FLOAT64_KHR)
                printf("\t%s=%g", all[j].name, all[j].value.f64);
            else if (all[j].format == VK_PIPELINE_EXECUTABLE_STATISTIC_FORMAT_BOOL32_KHR)
                printf("\t%s=%u", all[j].name, all[j].value.b32);
            else
                printf("\t%s=%llu", all[j].name, (unsigned long long)all[j].value.u64);
        }
        printf("\n");
        free(all);
        if (listing) write_listings(&info, path, properties[i].subgroupSize);
    }
    free(properties);
}

static void compile(const char *path, long seconds) {
    int listing = path[0] == '+';
    path += listing;
    FILE *file = fopen(path, "rb");
    if (!file) need(VK_ERROR_UNKNOWN, path);
    fseek(file, 0, SEEK_END);
    size_t size = ftell(file);
    rewind(file);
    uint32_t *words = malloc(size);
    if (size < 20 || fread(words, 1, size, file) != size) need(VK_ERROR_UNKNOWN, path);
    fclose(file);
    struct binding bindings[MOST];
    uint32_t count = reflect(words, size / 4, bindings), sets = 0;
    for (uint32_t i = 0; i < count; i++)
        if (bindings[i].set + 1 > sets) sets = bindings[i].set + 1;
    VkDescriptorSetLayout layouts[MOST];
    for (uint32_t set = 0; set < sets; set++) {
        VkDescriptorSetLayoutBinding of[MOST];
        uint32_t n = 0;
        for (uint32_t i = 0; i < count; i++)
            if (bindings[i].set == set)
                of[n++] = (VkDescriptorSetLayoutBinding){
                    bindings[i].number, bindings[i].type, 1, VK_SHADER_STAGE_COMPUTE_BIT, 0};
        VkDescriptorSetLayoutCreateInfo info = {VK_STRUCTURE_TYPE_DESCRIPTOR_SET_LAYOUT_CREATE_INFO, 0, 0, n, of};
        need(vkCreateDescriptorSetLayout(device, &info, 0, &layouts[set]), "layout of a set");
    }
    VkPipelineLayoutCreateInfo layout_info = {
        VK_STRUCTURE_TYPE_PIPELINE_LAYOUT_CREATE_INFO, 0, 0, sets, layouts, 0, 0};
    VkPipelineLayout layout;
    need(vkCreatePipelineLayout(device, &layout_info, 0, &layout), "layout of a pipeline");
    limit(seconds);
    double began = processor_ms();
    VkShaderModuleCreateInfo module_info = {VK_STRUCTURE_TYPE_SHADER_MODULE_CREATE_INFO, 0, 0, size, words};
    VkShaderModule module;
    VkPipeline pipeline = VK_NULL_HANDLE;
    VkResult result = vkCreateShaderModule(device, &module_info, 0, &module);
    if (result == VK_SUCCESS) {
        VkComputePipelineCreateInfo info = {
            .sType = VK_STRUCTURE_TYPE_COMPUTE_PIPELINE_CREATE_INFO,
            .flags = VK_PIPELINE_CREATE_CAPTURE_STATISTICS_BIT_KHR
                | (listing ? VK_PIPELINE_CREATE_CAPTURE_INTERNAL_REPRESENTATIONS_BIT_KHR : 0),
            // As wgpu does for devices with subgroup operations.
            .stage = {VK_STRUCTURE_TYPE_PIPELINE_SHADER_STAGE_CREATE_INFO, 0,
                VK_PIPELINE_SHADER_STAGE_CREATE_ALLOW_VARYING_SUBGROUP_SIZE_BIT, VK_SHADER_STAGE_COMPUTE_BIT, module,
                "main", 0},
            .layout = layout,
            .basePipelineIndex = -1,
        };
        result = vkCreateComputePipelines(device, VK_NULL_HANDLE, 1, &info, 0, &pipeline);
    }
    double ms = processor_ms() - began;
    limit(0);
    if (result == VK_SUCCESS) {
        print_statistics(pipeline, path, listing);
        vkDestroyPipeline(device, pipeline, 0);
        vkDestroyShaderModule(device, module, 0);
    }
    printf("done\t%d\t%.0f\n", result, ms);
    vkDestroyPipelineLayout(device, layout, 0);
    for (uint32_t set = 0; set < sets; set++) vkDestroyDescriptorSetLayout(device, layouts[set], 0);
    free(words);
}

static void open_device(void) {
    VkApplicationInfo application = {.sType = VK_STRUCTURE_TYPE_APPLICATION_INFO, .apiVersion = VK_API_VERSION_1_3};
    VkInstanceCreateInfo instance_info = {
        .sType = VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO, .pApplicationInfo = &application};
    VkInstance instance;
    need(vkCreateInstance(&instance_info, 0, &instance), "instance");
    VkPhysicalDevice physical;
    uint32_t count = 1;
    VkResult listed = vkEnumeratePhysicalDevices(instance, &count, &physical);
    if (listed < 0 || !count) need(listed < 0 ? listed : VK_ERROR_INITIALIZATION_FAILED, "no device");
    VkPhysicalDeviceDriverProperties of_driver = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_DRIVER_PROPERTIES};
    VkPhysicalDeviceProperties2 properties = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PROPERTIES_2, .pNext = &of_driver};
    vkGetPhysicalDeviceProperties2(physical, &properties);
    VkPhysicalDeviceRobustness2FeaturesEXT robust = {
        .sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ROBUSTNESS_2_FEATURES_EXT};
    VkPhysicalDeviceFeatures2 offered = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, .pNext = &robust};
    vkGetPhysicalDeviceFeatures2(physical, &offered);
    // The texts leave the bounds of buffers to the driver, as wgpu does only where the driver checks them.
    if (!robust.robustBufferAccess2) need(VK_ERROR_FEATURE_NOT_PRESENT, "robustBufferAccess2");
    const char *extensions[] = {"VK_KHR_pipeline_executable_properties", "VK_EXT_robustness2"};
    VkPhysicalDevicePipelineExecutablePropertiesFeaturesKHR of_executables = {
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_PIPELINE_EXECUTABLE_PROPERTIES_FEATURES_KHR, 0, 1};
    robust = (VkPhysicalDeviceRobustness2FeaturesEXT){
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_ROBUSTNESS_2_FEATURES_EXT, &of_executables, 1, 0, 0};
    VkPhysicalDeviceSubgroupSizeControlFeatures subgroups = {
        VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_SUBGROUP_SIZE_CONTROL_FEATURES, &robust, 1, 0};
    VkPhysicalDeviceFeatures2 wanted = {.sType = VK_STRUCTURE_TYPE_PHYSICAL_DEVICE_FEATURES_2, .pNext = &subgroups};
    wanted.features.robustBufferAccess = 1;
    uint32_t families = 16;
    VkQueueFamilyProperties family[16];
    vkGetPhysicalDeviceQueueFamilyProperties(physical, &families, family);
    uint32_t chosen = 0;
    while (chosen + 1 < families && !(family[chosen].queueFlags & VK_QUEUE_COMPUTE_BIT)) chosen++;
    float priority = 1;
    VkDeviceQueueCreateInfo queue = {VK_STRUCTURE_TYPE_DEVICE_QUEUE_CREATE_INFO, 0, 0, chosen, 1, &priority};
    VkDeviceCreateInfo info = {VK_STRUCTURE_TYPE_DEVICE_CREATE_INFO, &wanted, 0, 1, &queue, 0, 0, 2, extensions, 0};
    need(vkCreateDevice(physical, &info, 0, &device), "device");
    get_properties = (PFN_vkGetPipelineExecutablePropertiesKHR)vkGetDeviceProcAddr(
        device, "vkGetPipelineExecutablePropertiesKHR");
    get_statistics = (PFN_vkGetPipelineExecutableStatisticsKHR)vkGetDeviceProcAddr(
        device, "vkGetPipelineExecutableStatisticsKHR");
    get_representations = (PFN_vkGetPipelineExecutableInternalRepresentationsKHR)vkGetDeviceProcAddr(
        device, "vkGetPipelineExecutableInternalRepresentationsKHR");
    printf("device\t%s (%s)\n", properties.properties.deviceName, of_driver.driverInfo);
}

int main(int argc, char **argv) {
    if (argc != 3 || atol(argv[1]) < 1) {
        fprintf(stderr, "usage: compile SECONDS FOLDER <PATHS\n");
        return 2;
    }
    folder = argv[2];
    setvbuf(stdout, 0, _IOLBF, 0);
    open_device();
    char *line = 0;
    size_t capacity = 0;
    ssize_t length;
    while ((length = getline(&line, &capacity, stdin)) > 0) {
        if (isspace((unsigned char)line[length - 1])) line[length - 1] = 0;
        compile(line, atol(argv[1]));
    }
    // Not through the drivers' own ends: some wait for kernel drivers that are not there.
    fflush(stdout);
    _Exit(0);
}
