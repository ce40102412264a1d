# Table 1, Mask R-CNN: FKD. Paper: 41.7 COCO val box AP.
_base_ = "./mask-rcnn_cascade-x101-dconv_r50_fkd_ikd_2x_coco.py"
model = dict(adv=None, augment=None, stop_at=None)
