"""One module a benchmark: its files, its prompt, its rules. `TASKS` has all of them by name."""

from . import activitynet_qa, clips, egoschema, longvideobench, mlvu, mvbench, video_chatgpt, video_mme

TASKS = {
    task.name: task
    for task in (
        video_mme.WITHOUT,
        video_mme.WITH,
        mvbench.TASK,
        egoschema.FULL,
        egoschema.SUBSET,
        activitynet_qa.TASK,
        video_chatgpt.TASK,
        mlvu.TASK,
        longvideobench.TASK,
        clips.CHOICE,
        clips.OPEN,
    )
}
