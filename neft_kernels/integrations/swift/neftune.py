"""A plugin file for ms-swift: ``swift sft --external_plugins .../neftune.py --neftune_noise_alpha 5 ...``.

ms-swift puts the folder of a plugin file in front of ``sys.path``. Nothing else may lie in this folder.
"""

from neft_kernels.integrations.launch import patch_this_process

patch_this_process()
