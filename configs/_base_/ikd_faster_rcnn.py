# Faster R-CNN ResNet-50 from Faster R-CNN ResNet-101 with IKD, for the losses that were published on this pair. Schedule, attack,
# sampler and augmentation as in ikd_retinanet.py; learning rate 0.02, beta and the levels of the adversarial branch (0..3 of the
# neck's 5) those of Mask R-CNN, since IKD has no run of this pair. The student starts from its own neck and head.
_base_ = "mmdet::faster_rcnn/faster-rcnn_r50_fpn_2x_coco.py"
custom_imports = dict(imports=["ikd_fast.mmdet"])

model = dict(
    _delete_=True,
    type="IKDDistiller",
    student=_base_.model,
    teacher_config="mmdet::faster_rcnn/faster-rcnn_r101_fpn_2x_coco.py",
    teacher_ckpt="https://download.openmmlab.com/mmdetection/v2.0/faster_rcnn/faster_rcnn_r101_fpn_2x_coco/"
    "faster_rcnn_r101_fpn_2x_coco_bbox_mAP-0.398_20200504_210455-1d2dac9c.pth",
    adv=dict(
        beta=2.5e-7,
        attack=dict(type="OnlineDIFGSM", mode="carry", memory=dict(bits=4, stride=2, resolution="original")),
        loss=dict(type="AdvFeatureLoss", levels=(0, 1, 2, 3)),
    ),
    augment=dict(type="AdaptiveFreqAug", crop_align=8),
    stop_at=dict(epoch=16),
)
train_dataloader = dict(sampler=dict(_delete_=True, type="KeyedSampler", slots=16))
optim_wrapper = dict(optimizer=dict(lr=0.02), clip_grad=dict(max_norm=35, norm_type=2))
