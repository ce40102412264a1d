# Table 1, RetinaNet: ours (+FGD). Paper: 41.2 COCO val box AP.
_base_ = "../_base_/ikd_retinanet.py"
