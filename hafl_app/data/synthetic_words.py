"""Word table of the embedded data set: the concepts of 20 overlapping topics.

A section names the topic, or the two neighbouring topics, that own its
concepts. A line is one concept: the nouns that name it in training texts,
a bar, and the nouns that name it in test texts. No noun stands on both sides
of the table, and within a topic the two sides share no long run of letters,
so only the meaning of the words leads from one side to the other.
"""

from typing import Final

CONCEPT_TABLE: Final = """
[cooking]
dinner supper | lunch banquet
stew broth | soup gravy
oven stove | grill toaster
skillet saucepan | wok kettle
flour dough | bread pastry
butter cream | cheese yogurt
beef pork | steak bacon
salt pepper | sugar vinegar
cake cookie | pie pudding
[cooking gardening]
basil parsley | thyme mint
carrot potato | onion cabbage
tomato apple | lemon plum
[gardening]
rose tulip | lily daisy
soil compost | dirt manure
lawn meadow | grass turf
shovel spade | rake hoe
seed bulb | sprout sapling
hedge shrub | bush ivy
oak maple | pine willow
orchard vineyard | grove arboretum
[gardening wildlife]
bee butterfly | wasp moth
worm snail | slug beetle
robin sparrow | finch thrush
[wildlife]
wolf fox | bear coyote
lion tiger | leopard panther
deer elk | moose antelope
snake lizard | crocodile turtle
eagle hawk | owl falcon
monkey gorilla | ape chimpanzee
elephant rhino | giraffe zebra
forest jungle | woodland savanna
[wildlife weather]
desert tundra | arctic wilderness
river creek | flood rapids
[weather]
storm hurricane | typhoon tornado
rain drizzle | downpour shower
snow blizzard | frost hail
wind breeze | gust gale
heat warmth | drought temperature
fog mist | haze smog
thunder squall | lightning tempest
forecast humidity | climate barometer
[weather astronomy]
sky cloud | atmosphere horizon
sunrise dawn | dusk twilight
[astronomy]
planet mars | jupiter venus
galaxy nebula | universe cosmos
comet meteor | asteroid fireball
telescope observatory | hubble lens
orbit gravity | trajectory equinox
rocket spacecraft | satellite shuttle
moon crater | eclipse titan
star supernova | quasar pulsar
[astronomy computing]
simulation calculation | algorithm theorem
signal antenna | radar transmitter
[computing]
software program | code app
computer laptop | chip terminal
keyboard mouse | screen touchpad
internet website | browser homepage
server database | mainframe cluster
bug crash | glitch error
file folder | document archive
hacker virus | trojan intruder
[computing banking]
password login | username credentials
spreadsheet ledger | receipt invoice
[banking]
loan mortgage | debt credit
money cash | dollar currency
bank lender | broker treasury
savings deposit | wealth fund
interest dividend | profit yield
stock share | bond equity
budget income | salary revenue
inflation recession | economy price
[banking law]
fraud theft | bribery embezzlement
contract lease | accord clause
[law]
judge magistrate | court tribunal
lawyer attorney | advocate counsel
verdict ruling | sentence decree
crime murder | felony robbery
prison jail | custody inmate
lawsuit trial | hearing subpoena
witness testimony | evidence affidavit
police sheriff | detective patrolman
[law politics]
statute legislation | bill ordinance
constitution charter | freedom liberty
[politics]
president minister | governor mayor
election vote | ballot poll
parliament congress | senate assembly
campaign candidate | nominee rally
democracy republic | socialism monarchy
party coalition | liberals bloc
policy reform | cabinet agenda
debate speech | rhetoric manifesto
[politics military]
treaty truce | ceasefire armistice
ambassador embassy | envoy emissary
[military]
soldier troops | infantry platoon
gun rifle | pistol weapon
battle war | combat invasion
general colonel | sergeant lieutenant
tank artillery | cannon howitzer
bomb grenade | missile explosive
fort bunker | trench barracks
spy scout | sniper commando
[military religion]
crusade martyr | knight pilgrim
funeral grave | burial cemetery
[religion]
church chapel | cathedral mosque
priest bishop | monk rabbi
prayer worship | hymn psalm
bible gospel | torah koran
god deity | lord messiah
faith belief | spirituality christianity
heaven angel | paradise saint
sin devil | hell demon
[religion education]
sermon lesson | lecture homily
wisdom truth | philosophy ethics
[education]
school academy | college university
teacher professor | tutor instructor
student pupil | freshman learner
exam quiz | test midterm
homework essay | dissertation thesis
classroom chalk | seminar campus
grade diploma | degree honors
mathematics algebra | physics geometry
[education medicine]
laboratory experiment | research specimen
biology anatomy | chemistry botany
[medicine]
doctor nurse | surgeon physician
hospital clinic | infirmary ward
disease illness | tumor cancer
drug pill | remedy antibiotic
fever cough | headache nausea
vaccine injection | syringe immunity
heart lung | kidney liver
patient diagnosis | symptom relapse
[medicine sports]
injury sprain | fracture concussion
muscle knee | shoulder ankle
[sports]
football soccer | rugby hockey
team league | club squad
goal score | touchdown penalty
coach referee | umpire manager
athlete player | runner striker
championship tournament | cup trophy
tennis golf | cricket badminton
race marathon | sprint relay
[sports music]
stadium arena | venue coliseum
crowd fans | audience spectators
[music]
guitar violin | cello banjo
piano organ | harmonica harpsichord
song ballad | tune melody
singer vocalist | soprano choir
drum percussion | rhythm beat
orchestra symphony | concerto sonata
jazz blues | reggae funk
album record | soundtrack cassette
[music theatre]
opera musical | choreography dance
stage podium | curtain balcony
[theatre]
actor actress | performer cast
drama tragedy | comedy farce
script scene | dialogue monologue
director playwright | screenwriter producer
film movie | cinema documentary
rehearsal audition | premiere matinee
hero villain | protagonist character
puppet clown | mime marionette
[theatre fashion]
costume mask | disguise outfit
makeup wig | lipstick cosmetics
[fashion]
dress skirt | gown blouse
shirt jacket | coat sweater
shoe boot | sandal sneaker
jewelry necklace | bracelet earring
hat cap | scarf bonnet
silk cotton | velvet wool
designer model | mannequin stylist
purse wallet | handbag backpack
[fashion construction]
leather fabric | nylon canvas
pattern sketch | blueprint template
[construction]
brick cement | concrete mortar
roof ceiling | rafter attic
wall floor | foundation cellar
hammer nail | pliers wrench
crane bulldozer | forklift scaffold
builder carpenter | mason electrician
bridge tunnel | viaduct dam
house apartment | cottage skyscraper
[construction seafaring]
plank timber | plywood beam
rope chain | cable cord
[seafaring]
ship boat | vessel yacht
captain sailor | crew skipper
harbor port | dock pier
anchor rudder | mast hull
ocean sea | atlantic pacific
wave tide | surf swell
whale shark | dolphin tuna
pirate smuggler | buccaneer mutiny
[seafaring travel]
ferry cruise | steamer voyage
island beach | coast lagoon
[travel]
hotel hostel | inn resort
airport airline | flight aircraft
passport visa | luggage suitcase
tourist visitor | traveler sightseer
train railway | subway tram
taxi bus | cab limousine
map compass | guidebook itinerary
vacation holiday | trip excursion
[travel cooking]
restaurant cafe | diner bistro
waiter bartender | steward sommelier
"""
