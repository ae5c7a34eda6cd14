"""What a pool makes of the ways in which an actor can fail."""

from ray.exceptions import ActorDiedError, RayActorError

from opd_ray.room import _death


def test_an_actor_that_cannot_start_is_explained_by_the_last_line_of_its_traceback():
    """The bug: the whole remote traceback stood in the one line that a user gets."""

    class Failed(RayActorError):
        actor_init_failed = True

        def __str__(self):
            return "The actor died of an error in its creation task\n  File 'x'\nOSError: no such model\n"

    assert _death(Failed()) == "the actor could not start: OSError: no such model"


def test_an_actor_that_dies_later_keeps_rays_explanation_in_one_line():
    text = _death(ActorDiedError())
    assert text.startswith("the actor died: ")
    assert "\n" not in text
